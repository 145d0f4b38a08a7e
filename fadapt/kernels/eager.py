"""When a Triton kernel may be the body of an ``autograd.Function``, and a launch that costs little.

It imports no Triton: ``import fadapt`` reads it.
"""

import importlib.util
import inspect
import os
import shutil
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


@cache
def _triton() -> bool:
    # Triton compiles what launches a kernel with the machine's own compiler.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found = importlib.util.find_spec("triton") is not None
    return found and compiler is not None and torch.version.hip is None


def traced() -> bool:
    """Whether all that is computed must be an operation of torch, which is written down or looked
    at: by the compiler, by a mode (``make_fx``, ``FlopCounterMode``), by ``torch.jit.trace``."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._is_tracing()


def usable(x: Tensor, y: Tensor) -> bool:
    """Whether a Function whose body is a kernel can take these: on a GPU, and nothing traces."""
    return x.is_cuda and y.is_cuda and _triton() and not traced()


def forward_twice() -> bool:
    """Whether a jvp runs in a jvp: what a Function saved for the inner one, torch takes as
    constants there (2.13), so that plain torch must stand in for it."""
    return eager_transforms.JVP_NESTING > 1


@cache
def oft_kernels() -> Any:
    """OFT's, which import Triton: an import that a step would otherwise look up at every layer."""
    from fadapt.kernels import oft_gpu

    return oft_gpu


def readable(*tensors: Tensor) -> bool:
    """Whether a kernel can read these in a Function's body: what lies at their addresses is what
    they are.

    Not so of a wrapper of a transform or tracer. ``torch.func`` never hands one to a body, but the
    vmap inside ``torch.autograd`` does (``is_grads_batched=True``), and what has outlived its
    transform is one. Nor of zeros that forward-mode AD has not written, or of numbers that torch
    has yet to negate.
    """
    for t in tensors:
        if (
            type(t) not in _PLAIN
            or _functorch.is_functorch_wrapped_tensor(t)
            or _functorch.is_legacy_batchedtensor(t)
            or t.is_neg()
            or t._is_zerotensor()
        ):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
_functorch = torch._C._functorch
# Kernels as Triton compiled them, ready for a grid, by all that it compiles them for. To look that
# up here costs a third of what Triton's own call does, and a small step is bound by its launches.
_compiled: dict[Any, Any] = {}
_MOST = 4096


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[int, ...],
    **options: int,
) -> None:
    """Run a kernel on the device of its tensors.

    Args:
        kernel: of ``triton.jit``, whose parameters are the tensors, the numbers, the constants.
        grid: how many programs.
        tensors: on one device.
        numbers: known when it runs.
        constants: known when it is compiled.
        **options: Triton's: ``num_warps``, ``num_stages``.
    """
    device = tensors[0].get_device()
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, **options)
        return
    pointers = [t.data_ptr() for t in tensors]
    kinds = [t.dtype for t in tensors]
    key = (id(kernel), device, grid, numbers, constants, *kinds, *[p & 15 for p in pointers])
    ready = _compiled.get(key)
    if ready is not None:
        # Of a tensor Triton would ask for its pointer, and the driver whether that is one.
        ready(*pointers, *numbers, *constants, stream=torch._C._cuda_getCurrentRawStream(device))
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, **options)
    if compiled is not None:  # as Triton's interpreter returns
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = _launcher(compiled, grid)


def _launcher(compiled: Any, grid: tuple[int, int, int]) -> Any:
    """``compiled[grid]``, but that it makes nothing up for a profiler's hooks where there are
    none."""
    import triton

    plain, hooks = compiled[grid], triton.knobs.runtime
    names = ["self", "gridX", "gridY", "gridZ", "stream", "function", "args"]
    known = list(inspect.signature(type(compiled.run).__call__).parameters) == names
    if not known or not hasattr(hooks.launch_enter_hook, "calls"):
        return plain  # another Triton
    run, about = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)

    def launch(*args: Any, stream: int) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            plain(*args, stream=stream)
        else:
            run(*grid, stream, *about, *args)

    return launch
