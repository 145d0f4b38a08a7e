"""For tests of code that uses fadapt: hypothesis strategies, and a check that nothing changed.

Needs hypothesis, which is imported when this module is. The strategies shrink towards one float32
layer and a LoRA of rank 1.

Example:
    >>> import torch, fadapt as fa, fadapt.testing as ft
    >>> from hypothesis import given, settings, strategies as st
    >>> @settings(max_examples=10, deadline=None)
    ... @given(data=st.data(), model=ft.models(ft.dtypes(torch.float64)))
    ... def test_a_stack_of_two_is_a_loop_over_two(data, model):
    ...     method = data.draw(ft.methods(model))
    ...     pair = [data.draw(ft.adapters(model, method)) for _ in range(2)]
    ...     forward, x = fa.bind(model, method), data.draw(ft.inputs(model))
    ...     ys = torch.func.vmap(forward, in_dims=(0, None))(fa.stack(pair), x)
    ...     want = torch.stack([forward(p, x) for p in pair])
    ...     torch.testing.assert_close(ys, want)
    >>> test_a_stack_of_two_is_a_loop_over_two()
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fadapt.adapter import init
from fadapt.bases import base_of, is_supported
from fadapt.dora import DoRA
from fadapt.lora import LoRA
from fadapt.method import Method
from fadapt.oft import CAYLEY, OFT
from fadapt.purity import assert_pure
from fadapt.shell import layers_of

__all__ = [
    "assert_pure",
    "adapters",
    "dtypes",
    "generators",
    "inputs",
    "linears",
    "methods",
    "models",
    "shapes",
    "targets",
]

SEEDS = st.integers(0, 2**32 - 1)


def dtypes(*allowed: torch.dtype) -> Any:
    """Strategy for floating dtypes: float32, float64, bfloat16 and float16, or those given."""
    return st.sampled_from(allowed or (torch.float32, torch.float64, torch.bfloat16, torch.float16))


def generators() -> Any:
    """Strategy for ``torch.Generator`` on the CPU, each with a seed of its own."""
    return SEEDS.map(lambda seed: torch.Generator().manual_seed(seed))


def shapes(features: int, max_axes: int = 2, max_side: int = 4) -> Any:
    """Strategy for an input's shape, ``(*batch, features)`` with up to ``max_axes`` batch axes."""
    return st.lists(st.integers(1, max_side), max_size=max_axes).map(lambda b: (*b, features))


@st.composite
def inputs(draw: Any, model: nn.Module, max_axes: int = 2) -> Tensor:
    """Strategy for standard normal inputs ``[..., in_features]`` of a model or layer of ours, in
    the dtype of its first parameter."""
    dtype = next(p for p in model.parameters()).dtype
    shape = draw(shapes(model.in_features, max_axes))  # type: ignore[arg-type]
    return torch.randn(shape, generator=draw(generators())).to(dtype)


@st.composite
def linears(
    draw: Any, in_features: Any = None, out_features: Any = None, dtype: Any = None
) -> nn.Linear:
    """Strategy for dense layers, with and without a bias.

    Args:
        in_features, out_features: strategies for sizes; 1 to 8 if None.
        dtype: a strategy for the dtype; float32 if None.
    """
    n_in = draw(st.integers(1, 8) if in_features is None else in_features)
    n_out = draw(st.integers(1, 8) if out_features is None else out_features)
    kind = torch.float32 if dtype is None else draw(dtype)
    layer = nn.Linear(n_in, n_out, bias=draw(st.booleans()), device="meta", dtype=kind)
    g = draw(generators())
    for name, p in list(layer.named_parameters()):
        value = torch.randn(p.shape, generator=g) / n_in**0.5
        setattr(layer, name, nn.Parameter(value.to(kind)))
    return layer


class Net(nn.Module):
    """What :func:`models` draws: ``head(x + blocks(inlet(x)))``, with what real models have: a list
    of blocks, norms, layers under two names, and two layers with one weight."""

    def __init__(self, inlet: nn.Module, blocks: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.inlet, self.head = inlet, head
        self.blocks = nn.ModuleList(blocks)
        self.in_features, self.out_features = inlet.in_features, head.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        h = self.inlet(x)
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.head(h)
        return out


class Block(nn.Module):
    """``down(tanh(up(norm(h))))``."""

    def __init__(self, up: nn.Module, down: nn.Module, norm: nn.Module):
        super().__init__()
        self.norm, self.up_proj, self.down_proj = norm, up, down

    def forward(self, h: Tensor) -> Tensor:
        """``[..., width] -> [..., width]``."""
        out: Tensor = self.down_proj(torch.tanh(self.up_proj(self.norm(h))))
        return out


@st.composite
def models(draw: Any, dtype: Any = None, sizes: Any = None) -> nn.Module:
    """Strategy for small models in eval mode: up to three residual blocks between two layers, some
    blocks used twice, some weights tied. Each has ``in_features`` and ``out_features``.

    Quantize them by ``models().map(f)``.

    Args:
        dtype: a strategy for the one dtype of all parameters; float32 if None.
        sizes: a strategy for the layers' widths; 1 to 8 if None.
    """
    kind = st.just(torch.float32 if dtype is None else draw(dtype))
    sizes = st.integers(1, 8) if sizes is None else sizes
    width, inner = st.just(draw(sizes)), st.just(draw(sizes))
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 3))):
        if blocks and draw(st.booleans()):
            blocks.append(blocks[0])
            continue
        up, down = draw(linears(width, inner, kind)), draw(linears(inner, width, kind))
        if blocks and draw(st.booleans()):
            down.weight = blocks[0].get_parameter("down_proj.weight")
        # Over two numbers its output is +-1, whatever they are, and its derivative mere rounding.
        wide = up.in_features > 3
        norm = nn.LayerNorm(up.in_features, dtype=up.weight.dtype) if wide else nn.Identity()
        blocks.append(Block(up, down, norm if draw(st.booleans()) else nn.Identity()))
    inlet, head = draw(linears(sizes, width, kind)), draw(linears(width, sizes, kind))
    return Net(inlet, blocks, head).eval()


@st.composite
def targets(draw: Any, model: nn.Module) -> Any:
    """Strategy for the ``targets`` of a method, in each spelling; some layer always matches."""
    names = [name for name, module in model.named_modules() if is_supported(module)]
    if names == [""]:
        return "all-linear"
    whole = st.lists(st.sampled_from(names), min_size=1, unique=True)
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    tails = {name.rsplit(".", 1)[-1] for name in names}
    # An ending must not match other modules as well: "0" ends a block's path and a layer's.
    usable = [
        tail
        for tail in sorted(tails)
        if all(
            is_supported(model.get_submodule(name))
            for name in every
            if name == tail or name.endswith(f".{tail}")
        )
    ]
    spellings = [st.just("all-linear"), whole, whole.map(lambda n: "|".join(map(re.escape, n)))]
    if usable:
        spellings.append(st.lists(st.sampled_from(usable), min_size=1, unique=True))
    return draw(st.one_of(spellings))


@st.composite
def methods(draw: Any, model: nn.Module, kinds: Sequence[type] = (LoRA, DoRA, OFT)) -> Method:
    """Strategy for methods that fit the model, in their variants; dropout is 0, and the
    initialisations that need another base (PiSSA, OLoRA) are left out.

    Args:
        model: only read.
        kinds: of LoRA, DoRA and OFT, those wanted. OFT is drawn where the widths of the targets
            have a divisor above 1, for its blocks.
    """
    chosen = draw(targets(model))
    layers = layers_of(model, LoRA(targets=chosen))
    width = math.gcd(*[base_of(layer).in_features for layer in layers.values()])
    sizes = [b for b in range(2, width + 1) if width % b == 0]
    kind = draw(st.sampled_from([k for k in kinds if k is not OFT or sizes]))
    if kind is OFT:
        return OFT(
            block_size=draw(st.sampled_from(sizes)),
            cayley=draw(st.sampled_from(CAYLEY)),
            block_share=draw(st.booleans()),
            targets=chosen,
        )
    start = draw(st.sampled_from(["kaiming", "gaussian", "orthogonal"]))
    ranks = st.sampled_from([2, 4]) if start == "orthogonal" else st.integers(1, 4)
    paths = sorted(filter(None, layers))
    pattern = paths and draw(st.booleans()) and draw(st.sampled_from(paths))
    return kind(  # type: ignore[no-any-return]
        rank=draw(ranks),
        alpha=draw(st.sampled_from([None, 1.0, 3.0, 16.0])),
        targets=chosen,
        rslora=draw(st.booleans()),
        lora_bias=kind is LoRA and draw(st.booleans()),
        rank_pattern={re.escape(pattern): draw(ranks)} if pattern else {},
        init=start,
    )


@st.composite
def adapters(draw: Any, model: nn.Module, method: Method, fresh: bool = False) -> dict[str, Any]:
    """Strategy for adapters of ``method``, with normal noise on every leaf unless ``fresh``."""
    g = draw(generators())
    params: dict[str, Any] = init(method, model, generator=g)
    if fresh:
        return params
    return tree_map(  # type: ignore[no-any-return]
        lambda t: t + torch.randn(t.shape, generator=g).to(t) / 4, params
    )
