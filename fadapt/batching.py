"""The mixed batch: one forward in which each row wears its own adapter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fadapt.errors import AdapterError, ConfigError
from fadapt.functional import Forward, bind, form_of
from fadapt.kinds import Kinds
from fadapt.method import Method
from fadapt.rows import Rows, rows_of
from fadapt.shell import AdaptedLinear, join

_HELD = "fadapt_rows"
Ids = Sequence[int] | Tensor | tuple[Rows, ...]


class _Held(nn.Module):
    """Where a call's :class:`Rows` are put for the layers of a shell to read: whole, or where a
    tracer is to see them, tensor by tensor."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.whole: tuple[Rows, ...] | None = None
        for kind in range(kinds):
            for name in Rows.__dataclass_fields__:
                self.register_buffer(f"{name}{kind}", None, persistent=False)

    def rows(self, kind: int) -> Rows:
        if self.whole is not None:
            return self.whole[kind]
        held = self._buffers
        return Rows(**{name: held[f"{name}{kind}"] for name in Rows.__dataclass_fields__})


class _Worn:
    """A base as it is with the adapters of one kind on: what the next kind takes for its base."""

    def __init__(self, base: Any, method: Any, params: Any, rows: Rows):
        self.base, self.method, self.params, self.rows = base, method, params, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def linear(self, x: Tensor) -> Tensor:
        y: Tensor = self.method.apply_rows(self.base, self.params, self.rows, x)
        return y


class MixedLinear(AdaptedLinear):
    """A target layer inside a mixed shell: its base, and room for one layer of each kind's bank.

    Attributes:
        parts: ``{kind: the method at this layer}``.
    """

    def __init__(self, path: str, parts: Mapping[int, AdaptedLinear], held: _Held):
        first = next(iter(parts.values()))
        super().__init__(first.base_layer, first.base, first.method, path)
        self.path = path
        self.parts = {kind: layer.method for kind, layer in parts.items()}
        self._held = [held]  # in a list: not a child of every layer
        self._types = {kind: method.prepared_type for kind, method in self.parts.items()}
        self._names: dict[int, list[str]] = {}
        for kind, prepared in self._types.items():
            self._names[kind] = [f"{name}{kind}" for name in prepared._fields]
            for name in self._names[kind]:
                self.register_buffer(name, None, persistent=False)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """``[n, ..., in] -> [n, ..., out]``, row by row through its adapter."""
        (x,) = (*inputs, *named.values())
        base: Any = self.base
        held = self._buffers
        for kind, method in self.parts.items():
            rows = self._held[0].rows(kind)
            if rows.ids is None:
                continue
            # An embedding's ids have no last axis of features.
            least = 2 if x.is_floating_point() else 1
            if x.dim() < least or x.shape[0] != rows.ids.shape[0]:
                raise AdapterError(
                    f"layer {self.path!r} gets an input {list(x.shape)} for {rows.ids.shape[0]} "
                    "ids: in a mixed batch the first axis of every adapted layer's input must be "
                    "the row. Exclude layers that see rows joined or cut up."
                )
            params = self._types[kind](*[held[name] for name in self._names[kind]])
            base = _Worn(base, method, params, rows)
        if base is self.base:
            self.check_running()
        y: Tensor = base.linear(x)
        return y


class Mixed:
    """What :func:`bind_mixed` returns: ``mixed(bank, ids, *args, **kwargs)``.

    Attributes:
        method: the method that it was bound with.
        shell: the copy of the module tree that it runs.
        layers: ``{path: MixedLinear}``.
    """

    def __init__(self, model: nn.Module, method: Any, state: Mapping[str, Tensor] | None):
        kinds = method.methods if isinstance(method, Kinds) else (method,)
        self.method = method
        self._forwards = [bind(model, kind, state) for kind in kinds]
        paths = dict.fromkeys(path for forward in self._forwards for path in forward.layers)
        held, shell = _Held(len(kinds)), self._forwards[0].shell
        self.layers: dict[str, MixedLinear] = {}
        for path in paths:
            parts = {k: f.layers[path] for k, f in enumerate(self._forwards) if path in f.layers}
            layer = self.layers[path] = MixedLinear(path, parts, held)
            module = model.get_submodule(path)
            for alias, other in model.named_modules(remove_duplicate=False):
                if other is module and alias:
                    shell.set_submodule(alias, layer)
                elif other is module:
                    shell = layer
        # A child of the first layer, as a container such as nn.Sequential would run one of its own.
        first = next(iter(paths))
        self.layers[first].add_module(_HELD, held)
        self._held = join(first, _HELD)
        self.shell = shell
        self._forward = Forward(shell, self.layers, {}, kinds[0])
        # The banks that were checked last, one of each kind; see form_of.
        self._fits: list[Any] = [None] * len(kinds)

    def __repr__(self) -> str:
        return f"Mixed({type(self.shell).__name__}, {len(self.layers)} layers, {self.method})"

    def __call__(self, bank: Any, ids: Ids, *args: Any, **kwargs: Any) -> Any:
        """The model's own call; row i of the batch wears adapter ``ids[i]``.

        Args:
            bank: a stack of K adapters (see :func:`fadapt.stack`), or what :meth:`prepare` made of
                it; None for the base alone. Every leaf gets its gradient.
            ids: ``[n]`` integers in ``[0, K)``, or -1 for the base, whose rows have the very bits
                that the base alone gives for this batch; or :meth:`rows` of them, to check and
                sort them once for many calls.
            *args: the model's positional inputs.
            **kwargs: the model's keyword inputs.

        Returns:
            Whatever the model returns.

        Raises:
            AdapterError: an id out of range (ids that torch.compile or vmap traces cannot be
                checked: there every negative id is the base), a bank that does not fit, or a layer
                whose input does not have the row for its first axis.
        """
        if bank is None:
            return self._forward(None, *args, **kwargs)
        return self.run(bank, ids, args, kwargs)

    def run(
        self,
        bank: Any,
        ids: Ids,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """Call the shell, or a function that runs it, with a bank and ids."""
        prepared = self.prepare(bank)
        each = self.rows(ids, prepared)
        tensors: dict[str, Any] = {}
        whole = not torch.compiler.is_compiling()
        if whole:
            tensors[join(self._held, "whole")] = each
        for kind, (one, rows) in enumerate(zip(self._banks(prepared), each, strict=True)):
            if rows.ids is None:
                continue
            if not whole:
                for name, tensor in vars(rows).items():
                    if tensor is not None:
                        tensors[join(self._held, f"{name}{kind}")] = tensor
            for path, leaf in one.items():
                for name, tensor in zip(self.layers[path]._names[kind], leaf, strict=True):
                    tensors[join(path, name)] = tensor
        return self._forward.run(tensors, args, kwargs, function)

    def rows(self, ids: Ids, bank: Any) -> tuple[Rows, ...]:
        """Ids checked against a bank, and laid out for all layers.

        Raises:
            AdapterError: an id out of range; or rows that were laid out for a bank of another size.
        """
        firsts = [next(iter(one.values()))[0] for one in self._banks(bank)]
        if isinstance(ids, tuple) and ids and isinstance(ids[0], Rows):
            laid = [rows.size for rows in ids]
            if not torch.compiler.is_compiling() and any(
                size not in (None, first.shape[0]) for size, first in zip(laid, firsts, strict=True)
            ):
                raise AdapterError(
                    f"these rows were laid out for banks of {laid} adapters, and this one holds "
                    f"{[first.shape[0] for first in firsts]}: lay them out anew, mixed.rows(ids, "
                    "bank)."
                )
            return ids
        if isinstance(self.method, Kinds):
            ids = self.method.flat(ids)
        return rows_of(ids, [t.shape[0] for t in firsts], firsts[0].device)  # type: ignore[arg-type]

    def prepare(self, bank: Any) -> Any:
        """What can be built of a bank once for several calls, which take it instead."""
        each = [self._prepare(kind, one) for kind, one in enumerate(self._banks(bank))]
        return tuple(each) if isinstance(self.method, Kinds) else each[0]

    def _banks(self, bank: Any) -> Sequence[Mapping[str, Any]]:
        if not isinstance(self.method, Kinds):
            if isinstance(bank, Mapping):
                return (bank,)
        elif isinstance(bank, tuple) and len(bank) == len(self._forwards):
            return bank
        several = f"a tuple of {len(self._forwards)} stacks"
        size = f" of {len(bank)}" if isinstance(bank, tuple | list) else ""
        raise AdapterError(
            f"expected {several if isinstance(self.method, Kinds) else 'a stack'} {{path: "
            "parameters}, as fadapt.stack makes it of adapters (and their methods), or the params "
            f"of a fadapt.Bank; got a {type(bank).__name__}{size}."
        )

    def _prepare(self, kind: int, bank: Mapping[str, Any]) -> Mapping[str, Any]:
        forward, form = self._forwards[kind], form_of(bank)
        if form is None or form != self._fits[kind]:
            _check_bank(forward, bank)
            self._fits[kind] = form
        method = forward.method
        if all(type(leaf) is self.layers[p]._types[kind] for p, leaf in bank.items()):
            return bank
        bases = {path: layer.base for path, layer in forward.layers.items()}
        return torch.func.vmap(lambda one: dict(method.prepare(one, bases)))(dict(bank))


def bind_mixed(
    model: nn.Module, method: Method | Kinds, state: Mapping[str, Tensor] | None = None
) -> Mixed:
    """A pure forward of ``model`` in which row i of the batch wears adapter ``ids[i]`` of a bank.

    ``y_i = f(bank[ids[i]], x_i)``: one product with the frozen weights for the whole batch, and for
    each row one with its own adapter's. The rows of a batch must stay the first axis of every
    adapted layer's input, as they do in transformers' models. No dropout is applied.

    Args:
        model: any ``nn.Module``; left as it is.
        method: which layers, and how; for adapters that differ, what ``fadapt.stack(methods=...)``
            returned.
        state: as :func:`fadapt.bind`'s.

    Returns:
        ``mixed(bank, ids, *args, **kwargs)``; see :class:`Mixed`.

    Raises:
        ConfigError: the method has no rule for mixed batches, or saves modules whole.
        TargetError, UnsupportedLayerError: as :func:`fadapt.bind`.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2)
        >>> g = torch.Generator().manual_seed(0)
        >>> bank = fadapt.stack([fadapt.init(method, model, generator=g) for _ in range(2)])
        >>> mixed = fadapt.bind_mixed(model, method)
        >>> mixed(bank, [1, -1, 0], torch.ones(3, 4)).shape
        torch.Size([3, 3])

    The batch follows Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023,
    arXiv:2311.03285).
    """
    for one in method.methods if isinstance(method, Kinds) else (method,):
        _check_method(one)
    return Mixed(model, method, state)


def _check_bank(forward: Forward, bank: Mapping[str, Any]) -> None:
    leaves = tree_leaves(dict(bank))
    # No set of sizes: one that torch.export traces has no hash.
    if not leaves or any(not t.dim() or t.shape[0] != leaves[0].shape[0] for t in leaves):
        raise AdapterError(
            f"not a bank: its leaves are {[list(t.shape) for t in leaves[:6]]}, and the first "
            "axis of each must be K, the number of adapters. fadapt.stack makes one."
        )
    forward._check(tree_map(lambda t: t[0], dict(bank)))


def _check_method(method: Method) -> None:
    kind = type(method)
    apply = next((c for c in kind.__mro__ if "apply" in vars(c)), None)
    by_rows = next((c for c in kind.__mro__ if "apply_rows" in vars(c)), None)
    if by_rows is None or by_rows is not apply:
        # One that inherits apply_rows and has an apply of its own would be run as its parent.
        raise ConfigError(
            f"{kind.__name__} has no apply_rows of its own, which a mixed batch calls. Run its "
            "adapters one by one, or over a stack with torch.func.vmap(fadapt.bind(...))."
        )
    if method.modules_to_save or method.bias != "none":
        raise ConfigError(
            f"modules_to_save={list(method.modules_to_save)}, bias={method.bias!r}: a mixed batch "
            "runs one copy of a module, and cannot give each row its own. Merge it, or leave it "
            "out."
        )
