"""Several adapters on one model at once, in order: each adapts what those before it made.

In a layer that adapters 1 to n reach, ``layer_i = method_i over layer_(i-1)``, ``layer_0`` the
base: for LoRA a sum of updates, for OFT ``W R_1^T ... R_n^T``, and DoRA normalises the weight that
it finds. So merging adapters one after the other, first to last, gives the weights of the
composition. (PEFT 0.21 applies several OFT adapters in one order, and merges them in the other.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.adapted import Adapted, Step
from fadapt.adapter import scale_by
from fadapt.bases import Base
from fadapt.errors import AdapterError, ConfigError
from fadapt.functional import Forward, bind
from fadapt.lora import LoRABiasParams, LoRAParams
from fadapt.lora_embedding import LoRAEmbeddingParams
from fadapt.method import Method
from fadapt.oft import OFTParams
from fadapt.random import keep_mask
from fadapt.shell import AdaptedLinear, bias_at, join, share

Adapters = Sequence[Mapping[str, Any] | None]


class _Below:
    """A base under the first few adapters, with their dropout: the base of the next."""

    def __init__(self, chain: Adapted, keeps: Sequence[Tensor | None]):
        self.chain, self.keeps = chain, keeps

    def __getattr__(self, name: str) -> Any:
        # What adapters do not change is the layer's own: how a convolution slides.
        return getattr(self.chain if hasattr(self.chain, name) else self.chain.base, name)

    def linear(self, x: Tensor) -> Tensor:
        *before, last = self.chain.steps or (None,)
        if last is None:
            return self.chain.base.linear(x)  # type: ignore[no-any-return]
        below: Any = _Below(replace(self.chain, steps=tuple(before)), self.keeps[:-1])
        return last.method.apply(below, last.params, x, self.keeps[-1])  # type: ignore[no-any-return]


class ComposedLinear(AdaptedLinear):
    """A target layer under several adapters.

    Attributes:
        parts: ``{number of the adapter: its method at this layer}``.
    """

    def __init__(self, layer: AdaptedLinear, parts: Mapping[int, Method]):
        super().__init__(layer.base_layer, layer.base, layer.method, layer.path)
        self.parts = dict(parts)
        for k, method in self.parts.items():
            for name in {*method.params_type._fields, *method.prepared_type._fields}:
                self.register_buffer(f"{name}{k}", None, persistent=False)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        (x,) = (*inputs, *named.values())
        steps, keeps = [], []
        for k, method in self.parts.items():
            for kind in (method.prepared_type, method.params_type):
                values = [getattr(self, f"{name}{k}") for name in kind._fields]
                if all(value is not None for value in values):
                    params = kind(*values)
                    steps.append(Step(method, params))
                    keeps.append(self._mask(k, method, params, x))
                    break
        if not steps:
            self.check_running()
        return _Below(Adapted(self.biased(), tuple(steps)), keeps).linear(x)

    def _mask(self, k: int, method: Method, params: Any, x: Tensor) -> Tensor | None:
        if self.dropout_seed is None or method.dropout == 0:
            return None
        # A stream of its own for each adapter of each layer.
        seed = self.dropout_seed + self.stream + k * 0x9E3779B1
        return keep_mask(seed, method.keep_shape(params, x), method.dropout)


class Composed:
    """What :func:`fadapt.bind` returns for several methods: ``forward([params, ...], *inputs)``.

    Attributes:
        parts: what ``bind`` returns for each method alone.
        layers: ``{path: ComposedLinear}`` of the shell, of all methods together.
        shell: the copy of the module tree that it runs.
    """

    def __init__(self, parts: Sequence[Forward]):
        if not parts:
            raise ConfigError("bind() was given no methods: a list of them holds at least one.")
        self.parts = tuple(parts)
        shell = share(parts[0].shell, {})
        places: dict[str, list[str]] = {}
        for part in parts:
            for alias, module in part.shell.named_modules(remove_duplicate=False):
                if isinstance(module, AdaptedLinear):
                    at = places.setdefault(module.path, [])
                    at += [alias] if alias not in at else []
        self.layers: dict[str, ComposedLinear] = {}
        for path, aliases in places.items():
            own = {k: p.layers[path].method for k, p in enumerate(parts) if path in p.layers}
            layer = next(p.layers[path] for p in parts if path in p.layers)
            self.layers[path] = ComposedLinear(layer, own)
            for alias in aliases:
                if alias:
                    shell.set_submodule(alias, self.layers[path])
                else:
                    shell = self.layers[path]
        self.shell: nn.Module = shell
        saved = {p: names for part in parts for p, names in part.saved.items()}
        biases = {entry: path for part in parts for entry, path in part.biases.items()}
        whole = [p for p in saved if p not in biases]
        for path in self.layers:
            if above := [p for p in whole if f"{path}.".startswith(f"{p}.")]:
                raise ConfigError(
                    f"module {above[0]!r} is trained whole by one of the methods, and its layer "
                    f"{path!r} is adapted by another. Leave it out of modules_to_save, or exclude "
                    "it."
                )
        saved = {p: saved[p] for p in whole}
        self._run = Forward(shell, self.layers, saved, parts[0].method, biases).run

    def __repr__(self) -> str:
        methods = [part.method for part in self.parts]
        return f"Composed({type(self.shell).__name__}, {len(self.layers)} layers, {methods})"

    def __call__(
        self,
        params: Adapters | None,
        *args: Any,
        weights: Sequence[float | Tensor] | None = None,
        dropout: Tensor | torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own call, adapted by all of them.

        Args:
            params: an adapter for each method, or None in its place to leave it out; None for the
                base alone.
            *args: the model's positional inputs.
            weights: a factor for each adapter, 1 if left out; a tensor ``[]`` is differentiable.
                LoRA's update is multiplied by it, and OFT's skew-symmetric matrix: 0 is none of it.
            dropout: an int64 seed ``[]``, or a generator to draw one from; see :class:`Forward`.
            **kwargs: the model's keyword inputs.

        Raises:
            AdapterError: an adapter does not fit; a weight for an adapter that has no scale; a
                module that two of them replace.
        """
        given = [None] * len(self.parts) if params is None else list(params)
        for what, values in (("adapters", given), ("weights", weights)):
            if values is not None and len(values) != len(self.parts):
                raise AdapterError(
                    f"{len(values)} {what} were given; this forward was bound with "
                    f"{len(self.parts)} methods."
                )
        tensors = self._seeds(dropout)
        chains: dict[str, Adapted] = {}
        for k, (part, adapter) in enumerate(zip(self.parts, given, strict=True)):
            if adapter is None:
                continue
            part._check(adapter)
            if weights is not None:
                adapter = {
                    path: _weighted(leaf, weights[k], path) for path, leaf in adapter.items()
                }
            bases: dict[str, Base] = {}
            for path, layer in part.layers.items():
                below: Any = chains.setdefault(path, Adapted(layer.base))
                bases[path] = below
            ready = part.method.prepare(adapter, bases)
            for path, layer in part.layers.items():
                step = Step(layer.method, ready[path])
                chains[path] = replace(chains[path], steps=(*chains[path].steps, step))
                fields = ready[path]._asdict()
                tensors |= {join(path, f"{name}{k}"): t for name, t in fields.items()}
            for path in part.saved:
                own = part.of_module(path, adapter[path])
                held = {join(path, name): t for name, t in own.items()}
                if path in part.biases:
                    held = {bias_at(self.shell, part.biases[path]): own["bias"]}
                if tensors.keys() & held.keys():
                    raise AdapterError(f"module {path!r} is trained by two of the adapters.")
                tensors |= held
        return self._run(tensors, args, kwargs)

    def _seeds(self, dropout: Tensor | torch.Generator | None) -> dict[str, Tensor]:
        if dropout is None:
            return {}
        # Of a method that drops out on embeddings alone, which have none, nothing can be asked.
        able = [p for p in self.parts if any(at.method.dropout for at in p.layers.values())]
        part = (able or [p for p in self.parts if p.method.dropout] or self.parts)[0]
        if isinstance(dropout, Mapping):
            raise ConfigError("several adapters take one seed or generator, not masks by path.")
        (seed,) = {id(seed): seed for seed in part._seeds(dropout).values()}.values()
        return {join(path, "dropout_seed"): seed for path in self.layers}


def compose(
    model: nn.Module, methods: Sequence[Method], state: Mapping[str, Tensor] | None = None
) -> Composed:
    """``fadapt.bind`` for several methods: the adapters act one after the other.

    Example:
        >>> import torch, fadapt
        >>> model, x = torch.nn.Linear(8, 3), torch.ones(2, 8)
        >>> methods = [fadapt.OFT(block_size=4), fadapt.LoRA(rank=2, init="orthogonal")]
        >>> g = torch.Generator().manual_seed(0)
        >>> adapters = [fadapt.init(m, model, generator=g) for m in methods]
        >>> forward = fadapt.bind(model, methods)
        >>> torch.allclose(forward(adapters, x, weights=[0.5, 2.0]), model(x), atol=1e-6)
        True
    """
    return Composed([bind(model, method, state) for method in methods])


def _weighted(leaf: Any, weight: float | Tensor, path: str) -> Any:
    if isinstance(weight, float | int) and weight == 1:
        return leaf
    if isinstance(leaf, OFTParams):
        return OFTParams(leaf.oft_R * weight)
    if isinstance(leaf, LoRAParams | LoRABiasParams | LoRAEmbeddingParams):
        return scale_by({path: leaf}, weight)[path]
    kind = "a module trained whole" if isinstance(leaf, Mapping) else type(leaf).__name__
    raise AdapterError(
        f"{path!r}: {kind} has no part that a weight other than 1 could scale; "
        f"{LoRAParams.__name__} and {OFTParams.__name__} do."
    )
