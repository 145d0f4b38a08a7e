"""The mixed batch: one forward in which each row wears its own adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fadapt.errors import AdapterError, ConfigError
from fadapt.functional import AdaptedLinear, Forward, bind, join
from fadapt.method import Method
from fadapt.rows import Rows, rows_of

_ROWS = "fadapt_rows"


class _Held(nn.Module):
    """Where ``functional_call`` puts a call's :class:`Rows` for the layers of a shell to read."""

    ids: Tensor
    live: Tensor | None
    order: Tensor | None
    ends: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in Rows.__dataclass_fields__:
            self.register_buffer(name, None, persistent=False)

    def rows(self) -> Rows:
        return Rows(self.ids, self.live, self.order, self.ends)


class MixedLinear(AdaptedLinear):
    """A target layer inside a mixed shell: its base, and room for one layer's bank."""

    def __init__(self, layer: AdaptedLinear, path: str, held: _Held):
        super().__init__(layer.base_layer, layer.base, layer.method, path)
        self.path = path
        self._held = [held]  # in a list: not a child of every layer

    def forward(self, x: Tensor) -> Tensor:
        """``[n, ..., in] -> [n, ..., out]``, row by row through its adapter."""
        given = {n: t for n in self.fields if (t := getattr(self, n)) is not None}
        if not given:
            return self.base.linear(x)
        rows = self._held[0].rows()
        if x.dim() < 2 or x.shape[0] != rows.ids.shape[0]:
            raise AdapterError(
                f"layer {self.path!r} gets an input {list(x.shape)} for {rows.ids.shape[0]} ids: "
                "in a mixed batch the first axis of every adapted layer's input must be the row. "
                "Exclude layers that see rows joined or cut up."
            )
        method: Any = self.method
        y: Tensor = method.apply_rows(self.base, self.kinds[tuple(given)](**given), rows, x)
        return y


class Mixed:
    """What :func:`bind_mixed` returns: ``mixed(bank, ids, *args, **kwargs)``.

    Attributes:
        method: the method that it was bound with.
        shell: the copy of the module tree that it runs.
        layers: ``{path: MixedLinear}``.
    """

    def __init__(self, forward: Forward):
        held = _Held()
        self.method = forward.method
        self.layers: dict[str, MixedLinear] = {}
        shell = forward.shell
        paths = {id(layer): path for path, layer in forward.layers.items()}
        for alias, module in list(shell.named_modules(remove_duplicate=False)):
            if (path := paths.get(id(module))) is None:
                continue
            if path not in self.layers:
                self.layers[path] = MixedLinear(forward.layers[path], path, held)
            if alias:
                shell.set_submodule(alias, self.layers[path])
            else:
                shell = self.layers[path]
        # A child of the first layer, as a container such as nn.Sequential would run one of its own.
        first = next(iter(self.layers))
        self.layers[first].add_module(_ROWS, held)
        self._held = join(first, _ROWS)
        self.shell = shell
        self._forward = Forward(shell, self.layers, forward.saved, forward.method)

    def __repr__(self) -> str:
        return f"Mixed({type(self.shell).__name__}, {len(self.layers)} layers, {self.method})"

    def __call__(
        self,
        bank: Mapping[str, Any] | None,
        ids: Sequence[int] | Tensor | Rows,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
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
        bank = self.prepare(bank)
        rows = self.rows(ids, bank)
        tensors = {join(self._held, n): t for n, t in vars(rows).items() if t is not None}
        for path, leaf in bank.items():
            tensors |= {join(path, name): tensor for name, tensor in leaf._asdict().items()}
        return self._forward.run(tensors, args, kwargs)

    def rows(self, ids: Sequence[int] | Tensor | Rows, bank: Mapping[str, Any]) -> Rows:
        """Ids checked against a bank, and laid out for all layers."""
        first = tree_leaves(dict(bank))[0]
        return rows_of(ids, first.shape[0], first.device)

    def prepare(self, bank: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a method can build of a bank once for several calls, which take it instead."""
        sizes = {t.shape[0] if t.dim() else 0 for t in tree_leaves(dict(bank))}
        if len(sizes) != 1 or 0 in sizes:
            raise AdapterError(
                f"not a bank: its leaves' first axes are {sorted(sizes)}, and each must be K, the "
                "number of adapters. fadapt.stack makes one."
            )
        first = tree_map(lambda t: t[0], dict(bank))
        self._forward._check(first)
        if all(type(leaf) is self.method.prepared_type for leaf in bank.values()):
            return bank
        bases = {path: layer.base for path, layer in self.layers.items()}
        return torch.func.vmap(lambda one: dict(self.method.prepare(one, bases)))(dict(bank))


def bind_mixed(
    model: nn.Module, method: Method, state: Mapping[str, Tensor] | None = None
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
    _check_method(method)
    return Mixed(bind(model, method, state))


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
    if method.modules_to_save:
        raise ConfigError(
            f"modules_to_save={list(method.modules_to_save)}: a mixed batch runs one copy of a "
            "module, and cannot give each row its own. Merge it, or leave it out."
        )
