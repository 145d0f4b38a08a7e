"""What a method is: how an adapter's parameters change a frozen base. It knows no format."""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor

from fadapt.bases import Base


class Method(Protocol):
    """A frozen dataclass of hyperparameters whose functions are pure (:class:`fadapt.LoRA`).

    One layer's parameters are a NamedTuple of tensors, every one of them trainable.
    """

    @property
    def targets(self) -> str | Sequence[str]: ...

    @property
    def exclude(self) -> str | Sequence[str]: ...

    @property
    def layers_to_transform(self) -> Sequence[int]: ...

    @property
    def layers_pattern(self) -> Sequence[str]: ...

    @property
    def modules_to_save(self) -> Sequence[str]: ...

    @property
    def bias(self) -> str: ...

    @property
    def dropout(self) -> float: ...

    @property
    def params_type(self) -> Any:
        """The NamedTuple class of one layer's parameters."""
        ...

    @property
    def prepared_type(self) -> Any:
        """The NamedTuple class that :meth:`prepare` makes of it; the same if it makes none."""
        ...

    def at(self, paths: Sequence[str]) -> dict[str, Any]:
        """The method as it stands at each of these layers: any pattern of paths applied."""
        ...

    def init_layer(self, base: Base, generator: torch.Generator | None) -> tuple[Any, Base | None]:
        """One layer's fresh parameters; and the base that they need, if not the one given."""
        ...

    def check(self, base: Base, params: Any, path: str) -> None:
        """Raise AdapterError unless one layer's parameters fit its base. Reads types, shapes and
        dtypes alone: what passed is not checked again."""
        ...

    def prepare(self, params: Mapping[str, Any], bases: Mapping[str, Base]) -> Mapping[str, Any]:
        """What can be built of an adapter once for several forwards, which take it in its place."""
        ...

    def keep_shape(self, params: Any, x: Tensor) -> torch.Size:
        """The shape of dropout's mask for an input x ``[..., in]``."""
        ...

    def apply(self, base: Base, params: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The adapted layer, ``[..., in] -> [..., out]``; ``keep`` is dropout's mask."""
        ...

    def merge(self, weight: Tensor, params: Any, rows: slice = slice(None)) -> Tensor:
        """Rows ``rows`` of the adapted weight, from the same rows of W ``[rows, in]``."""
        ...

    def unmerge(self, weight: Tensor, params: Any, rows: slice = slice(None)) -> Tensor:
        """The inverse of :meth:`merge`."""
        ...

    def merge_bias(self, bias: Tensor | None, params: Any) -> Tensor | None:
        """The bias ``[out]`` of the merged layer, from that of the base."""
        ...

    def unmerge_bias(self, bias: Tensor | None, params: Any) -> Tensor | None:
        """The inverse of :meth:`merge_bias`."""
        ...


@singledispatch
def ready(method: Any, params: Mapping[str, Any], bases: Mapping[str, Base]) -> Mapping[str, Any]:
    """What one forward runs with: what :meth:`Method.prepare` makes of an adapter, but for layers
    that do better with their own part when they know their input."""
    prepared: Mapping[str, Any] = method.prepare(params, bases)
    return prepared


@singledispatch
def to_merge(
    method: Any, params: Mapping[str, Any], bases: Mapping[str, Base]
) -> Mapping[str, Any]:
    """What a merge runs with, which takes a weight's rows part by part."""
    prepared: Mapping[str, Any] = method.prepare(params, bases)
    return prepared


@singledispatch
def over(base: Any, method: Any, path: str) -> Any:
    """The method as it stands over this kind of layer: itself, over a linear one.

    Args:
        base: of the layer.
        method: as it stands at the layer's path.
        path: for messages.

    Raises:
        ConfigError: the method has no form for such a layer.
    """
    return method
