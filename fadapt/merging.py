"""Merging adapters into the weights of their base: pure functions that return new ones.

Each layer is dequantized, adapted and rounded once, by blocks of rows, to the format that it had;
the format is read off the layer, and so no configuration is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fadapt.adapted import Adapted
from fadapt.aqlm_merge import Recode, encoded, recoded, refuse
from fadapt.bases import Base, Conv, Dense, Embedding
from fadapt.bases.grid import Gridded
from fadapt.errors import ConfigError, MergeError
from fadapt.formats import AqlmFormat, like_named, put, rebuilt
from fadapt.layer_merge import Merged, merge_layer, with_bias
from fadapt.plan import Plan, check_untied, plan
from fadapt.rounding import Rounding
from fadapt.shell import join, share
from fadapt.undo import record

Progress = Callable[[str, int, int], Any]


class Layer(NamedTuple):
    """One layer of a merge: what it was, and what it became."""

    path: str
    adapted: Adapted
    merged: Merged

    @property
    def base(self) -> Base:
        """What it was."""
        return self.adapted.base  # type: ignore[no-any-return]


def merge(model: nn.Module, params: Any, method: Any, *, undo: bool = False, **options: Any) -> Any:
    """The weights of ``model`` with the adapter in them, in the formats that they had.

    ``W' = round(merge(dequantize(W)))``, one rounding a layer, whatever number of adapters.

    Args:
        model: only read; nothing in it changes.
        params: an adapter; or several, merged in that order.
        method: its method; or as many.
        undo: also return the record that :func:`unmerge` takes to come back bit for bit.
        **options: how to round, see :func:`merge_layers`.

    Returns:
        ``{name: tensor}`` of the merged layers, for ``functional_call(model, state, x)``: an int8
        layer's ``weight`` is again an ``Int8Tensor`` of the same granularity. With ``undo``, that
        and ``{path: {name: tensor}}``.

    Raises:
        AdapterError: an adapter that does not fit, or holds NaN or Inf.
        MergeError: the result would hold NaN or Inf; a tied weight; a format that would lose the
            adapter.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2, init="orthogonal")
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> state, x = fadapt.merge(model, params, method), torch.ones(2, 4)
        >>> y = torch.func.functional_call(model, state, (x,))
        >>> torch.allclose(y, fadapt.bind(model, method)(params, x), atol=1e-6)
        True
    """
    todo = plan(model, params, method, options.get("safe", True))
    check_untied(model, todo.owners)
    state, back = todo.beside, _old_biases(model, todo) if undo else {}
    for path, adapted, merged in merge_layers(todo, **options):
        layer = model.get_submodule(path)
        if not _holds(layer, options.get("to"), adapted.base, merged.base):
            raise MergeError(
                f"layer {path!r}: a {type(layer).__name__} cannot hold a weight of another format. "
                "fadapt.merged_model puts a fitting layer in its place."
            )
        state |= {join(path, name): t for name, t in named(layer, merged.base).items()}
        if undo:
            back[path] = _record(todo, adapted, merged, path)
    return (state, back) if undo else state


def merged_model(
    model: nn.Module, params: Any, method: Any, *, undo: bool = False, **options: Any
) -> Any:
    """A new model of the same kind with the adapter in its weights: the vendors' own layers.

    Tensors that no adapter changes are shared with ``model``; merged layers have their own, also
    where they were tied to another module.

    Args:
        model, params, method, undo, **options: as :func:`merge`.

    Returns:
        The model; with ``undo`` also the record.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2, init="orthogonal")
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> type(fadapt.merged_model(model, params, method)).__name__
        'Linear'
    """
    todo = plan(model, params, method, options.get("safe", True))
    back: dict[str, Any] = _old_biases(model, todo) if undo else {}

    def fresh() -> Iterator[tuple[str, Any, Any]]:
        for path, adapted, merged in merge_layers(todo, **options):
            if undo:
                back[path] = _record(todo, adapted, merged, path)
            yield path, adapted.base, merged.base

    shell = with_layers(model, fresh())
    for name, tensor in todo.beside.items():
        put(shell, name, tensor)
    return (shell, back) if undo else shell


def with_layers(model: nn.Module, layers: Iterable[tuple[str, Any, Any]]) -> nn.Module:
    """A copy of the model that shares its tensors, with new layers in it.

    Args:
        model: left as it is.
        layers: ``(path, the base that is there, the base that is to be)``.
    """
    shell = share(model, {})
    new = ((path, rebuilt(shell.get_submodule(path), old, to)) for path, old, to in layers)
    return placed(shell, new)


def placed(shell: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> nn.Module:
    """``shell`` with these layers in it, each wherever the one that it replaces was.

    Args:
        shell: changed, and returned; or the layer that takes the place of all of it.
        layers: ``(path, the layer)``.
    """
    names = {id(m): path for path, m in shell.named_modules()}
    aliases: dict[str, list[str]] = {}
    for alias, module in shell.named_modules(remove_duplicate=False):
        aliases.setdefault(names[id(module)], []).append(alias)
    for path, layer in layers:
        for alias in aliases[path]:
            if alias:
                shell.set_submodule(alias, layer)
            else:
                shell = layer
    return shell


def merge_layers(
    todo: Plan,
    *,
    to: str | None = None,
    scales: str = "auto",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    moments: Mapping[str, Tensor] | None = None,
    amax: Mapping[str, float] | None = None,
    aqlm: Recode | None = None,
    safe: bool = True,
    progress: Progress | None = None,
) -> Iterator[Layer]:
    """Merge a layer at a time.

    Args:
        todo: what :func:`fadapt.plan.plan` returned.
        to: the format of the result (see :func:`fadapt.formats.like_named`); the layer's own, if
            None.
        scales: ``"auto"`` keeps a block's scale while the merged weight fits it; ``"fresh"``
            computes all anew; ``"keep"`` none, and saturates.
        rounding: ``"nearest"``, ``"search"``, ``"feedback"`` or ``"stochastic"``; see
            :mod:`fadapt.rounding`.
        generator: for ``"stochastic"``; and for ``to="aqlm-..."``.
        moments: ``{path: X^T X}`` of the linear layers' inputs; see :func:`fadapt.calibrate`.
            Embeddings and convolutions are rounded to nearest without them.
        amax: ``{path: largest magnitude of its inputs}``, for ``to="inc-fp8"``; see
            :func:`fadapt.input_amax`.
        aqlm: how to merge into AQLM layers. None: refuse, saying what would be kept; with
            ``to="aqlm-..."``, ``Recode()``.
        safe: refuse NaN and Inf, in the adapter and in the result.
        progress: called before each layer, with its path, its index and their number.

    Raises:
        ConfigError: no such format or rounding, or one that the format has no use for.
    """
    how = Rounding(rounding, generator, moments)
    at_nearest = how if rounding == "stochastic" else Rounding()
    check_rounding(to, rounding)
    likes = {p: b if to is None else like_named(to, b, p, amax) for p, b in todo.bases.items()}
    for path, like in likes.items():  # what would stop a later layer, before the first is merged
        base = todo.bases[path]
        if not isinstance(base, Conv | Embedding):
            how.moment(path, base.in_features)
        if aqlm is None and not isinstance(like, AqlmFormat | Gridded):
            refuse(todo.adapted(path), path)
    for k, (path, like) in enumerate(likes.items()):
        if progress is not None:
            progress(path, k, len(likes))
        adapted = todo.adapted(path)
        # Second moments are those of vectors.
        mine = at_nearest if isinstance(adapted.base, Conv | Embedding) else how
        # A grid that is not the layer's own has no scales yet to keep.
        chosen = scales if to is None else "fresh"
        if not isinstance(like, Gridded):
            codes, moment = aqlm or Recode(), how.moment(path, adapted.in_features)
            if isinstance(like, AqlmFormat):
                new = encoded(adapted, path, like, codes, moment, generator, safe)
            else:
                new = recoded(adapted, path, codes, moment, safe)
            yield Layer(path, adapted, Merged(with_bias(new, adapted.bias)))
            continue
        merged = merge_layer(adapted, path, mine, like=like, scales=chosen, safe=safe)
        yield Layer(path, adapted, merged)


def check_rounding(to: str | None, rounding: str) -> None:
    """Raise ConfigError if the format ``to`` has no use for this rounding."""
    if to is not None and to.startswith("aqlm") and rounding != "nearest":
        raise ConfigError(
            f"rounding={rounding!r} with to={to!r}: AQLM's codes are searched for, not rounded. "
            "Leave rounding out."
        )


def _holds(layer: nn.Module, to: str | None, old: Any, new: Any) -> bool:
    """Whether the layer runs with the new base's tensors in place of its own."""
    if to is None or (isinstance(new, Dense) and type(new) is type(old)):
        return True
    return isinstance(layer, nn.Linear) and new.state().keys() <= {"weight", "bias"}


def _old_biases(model: nn.Module, todo: Plan) -> dict[str, Any]:
    return {p: {"bias": model.get_parameter(join(p, "bias")).detach()} for p in todo.others}


def _record(todo: Plan, adapted: Adapted, merged: Merged, path: str) -> Any:
    old, new = adapted.base, merged.base
    if type(old) is not type(new) or old.dtype != new.dtype:
        raise ConfigError(
            f"undo=True, but layer {path!r} goes to another format: the way back is the model that "
            "you have."
        )
    return record(old, new, todo.steps[path], adapted.steps)


def named(layer: nn.Module, base: Any) -> dict[str, Tensor]:
    """The base's tensors as this layer holds them."""
    state: dict[str, Tensor] = base.state()
    if type(base).__module__ == "fadapt.bases.aqlm" and hasattr(layer, "codes"):
        from fadapt.bases.aqlm_codes import is_permuted

        if is_permuted(layer):  # as a layer that has run on a CPU is, so that the state runs in it
            state["codes"] = state["codes"].transpose(0, 1).contiguous()
    return state
