"""What a base is, and how a layer becomes one.

A base is a frozen linear map ``x -> W x + b`` whose ``W [out, in]`` is held in some format. It is
an immutable pytree, knows nothing of adapters, and shares its tensors with the layer it was read
from.

An embedding and a convolution (``embedding.py``, ``conv.py``) are bases too, whose ``linear`` takes
ids or an image; their W is a matrix all the same, and merging sees no more of them than that.
"""

import importlib
from collections.abc import Callable
from functools import singledispatch
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fadapt.errors import UnsupportedLayerError


@runtime_checkable
class Base(Protocol):
    """A frozen linear map. Every format in this package meets it; so can one of your own."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that ``dequantize`` returns by default."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        ...

    def linear(self, x: Tensor) -> Tensor:
        """``W x + b`` for x ``[..., in]``: ``[..., out]``. Differentiable in x, by every transform;
        saves no float copy of W for backward; never writes."""
        ...

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as a float tensor ``[out, in]``, in ``dtype`` or the base's own."""
        ...

    def requantize(self, weight: Tensor) -> "Base":
        """A base of the same format that holds ``weight`` ``[out, in]``; this one is unchanged."""
        ...

    def rows(self, rows: slice) -> "Base":
        """The same map for some of its output rows, its tensors shared: the base of ``W[rows]``.
        What walks over W a block at a time (a norm, a merge) needs no more."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors as the layer it came from names them, in the layer's own format: what
        ``torch.func.functional_call(layer, base.state(), x)`` takes."""
        ...


Reader = Callable[[Any], Base]
R = TypeVar("R", bound=Reader)

# Root package of a layer's class, or of its weight's -> our module that registers its readers when
# imported. So `import fadapt` imports no backend, and a backend that is absent costs nothing.
_FAMILIES = {
    "aqlm": "fadapt.bases.aqlm",
    "neural_compressor": "fadapt.bases.inc_fp8",
    "torchao": "fadapt.bases.torchao",
    "transformers": "fadapt.bases.conv1d",
}


@singledispatch
def _read_layer(module: object) -> Base:
    raise NotImplementedError


@singledispatch
def _read_weight(weight: object, module: nn.Linear) -> Base:
    raise NotImplementedError


def register_base(layer_type: type, reader: Reader | None = None) -> Any:
    """Teach fadapt a layer class of your own.

    Args:
        layer_type: the class of layers to read, subclasses included.
        reader: a function from such a layer to an object that meets :class:`Base`. Left out, a
            decorator is returned.

    Returns:
        The reader, unchanged.

    Example:
        >>> import torch, fadapt
        >>> class Scaled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> @fadapt.register_base(Scaled)
        ... def read_scaled(layer):
        ...     return fadapt.Dense(2 * layer.weight.detach(), 2 * layer.bias.detach())
        >>> fadapt.base_of(Scaled(4, 3)).out_features
        3
    """
    if reader is None:
        return lambda f: register_base(layer_type, f)
    _read_layer.register(layer_type, reader)
    return reader


def register_weight(weight_type: type, reader: Callable[[Any, nn.Linear], Base]) -> None:
    """The same for a tensor subclass that an ``nn.Linear`` may carry as its weight."""
    _read_weight.register(weight_type, reader)


@singledispatch
def _take_state(layer: object, name: str, own: Tensor) -> None:
    pass


def take_state(layer: nn.Module, name: str, own: Tensor) -> None:
    """Tell a copy of a layer that it holds one tensor of a base's ``state()``.

    Args:
        layer: the copy, which may note it. Most have nothing to note.
        name: of the tensor in the layer.
        own: what the layer itself holds under that name.
    """
    _load_families(layer)
    _take_state(layer, name, own)


def register_state(layer_type: type, note: Callable[[Any, str, Tensor], None]) -> None:
    """What :func:`take_state` does for a class of layers."""
    _take_state.register(layer_type, note)


def _load_families(obj: object) -> None:
    roots = {c.__module__.split(".", 1)[0] for c in type(obj).__mro__}
    for root in roots & _FAMILIES.keys():
        importlib.import_module(_FAMILIES[root])


def base_of(module: nn.Module) -> Base:
    """Read a layer as a base. Shares its storage, copies nothing, changes nothing.

    Args:
        module: an ``nn.Linear`` (dense, or with a torchao weight), a transformers ``Conv1D``, an
            ``aqlm.QuantizedLinear``, an ``nn.Embedding``, an ``nn.Conv1d``, ``Conv2d`` or
            ``Conv3d``, or a layer of a class given to :func:`register_base`.

    Returns:
        The base: an immutable pytree of the layer's (detached) tensors.

    Raises:
        UnsupportedLayerError: no reader for this class of layer or weight.

    Example:
        >>> import torch, fadapt
        >>> base = fadapt.base_of(torch.nn.Linear(4, 3))
        >>> base.linear(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """
    _load_families(module)
    reader = _read_layer.dispatch(type(module))
    if reader is _read_layer.dispatch(object):
        raise UnsupportedLayerError(
            f"{type(module).__module__}.{type(module).__qualname__} is not a layer that fadapt can "
            "adapt. Supported: nn.Linear (dense, or with a torchao weight), transformers' Conv1D, "
            "aqlm.QuantizedLinear, INC's PatchedLinear, nn.Embedding, nn.Conv1d, Conv2d, Conv3d. "
            "For a layer of your own, register a reader with fadapt.register_base."
        )
    return reader(module)


def is_supported(module: nn.Module) -> bool:
    """Whether :func:`base_of` has a reader for this layer's class; reads no tensor."""
    _load_families(module)
    return _read_layer.dispatch(type(module)) is not _read_layer.dispatch(object)


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is one that :func:`base_of` reads, and its input a vector: no embedding and
    no convolution."""
    return is_supported(module) and not isinstance(module, (nn.Embedding, _ConvNd))


def _read_linear(module: nn.Linear) -> Base:
    kind = type(module)
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise UnsupportedLayerError(
            "This linear belongs to nn.MultiheadAttention, which reads its weight and never calls "
            "it: an adapter here would be ignored. Adapt a model that calls its projections."
        )
    if kind.forward is not nn.Linear.forward:
        raise UnsupportedLayerError(
            f"{kind.__module__}.{kind.__qualname__} is an nn.Linear with a forward of its own, "
            "which fadapt cannot assume to be W x + b. Register a reader for it with "
            "fadapt.register_base."
        )
    weight = module.weight
    _load_families(weight)
    reader = _read_weight.dispatch(type(weight))
    if reader is _read_weight.dispatch(object):
        raise UnsupportedLayerError(
            f"An nn.Linear whose weight is a {type(weight).__module__}.{type(weight).__qualname__} "
            "is not supported. Supported: plain floating tensors, and torchao's Int8Tensor, "
            "Float8Tensor, IntxUnpackedToInt8Tensor and Int4Tensor."
        )
    return reader(weight, module)


register_base(nn.Linear, _read_linear)
