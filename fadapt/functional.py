"""``bind``: a model and a method become a pure function of the adapter's parameters.

The function runs a *shell*: a copy of the model's module tree that shares every tensor with it, in
which each target layer is replaced by an :class:`AdaptedLinear`. It is handed its parameters for
the time of one call, as ``torch.func.functional_call`` does. The model itself is never touched.

Which setting of a transformers model each transform needs (tests/test_transformers.py runs each):

======================================= ==========================================================
grad, vmap, vmap(grad), jacrev          any attention. On a CPU sdpa has no batching rule, and vmap
                                        runs it once an adapter: ``attn_implementation="eager"``
jvp, jacfwd, hessian, grad of grad      ``attn_implementation="eager"``, or sdpa inside of
                                        ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``
masks that vmap maps over               additive ones, ``[batch, 1, queries, keys]``; transformers
                                        looks into those of ``[batch, keys]``
vmap that returns the model's output    ``use_cache=False``: a cache is no pytree
torch.compile(fullgraph=True)           ``attn_implementation="eager"``, ``use_cache=False``
dropout of the model's own, in training ``model.eval()`` before ``bind`` (the adapter's dropout is
                                        another), or ``vmap(..., randomness="different")``
activation checkpointing, training mode ``fadapt.value_and_grad`` or ``.backward()``; no transform
======================================= ==========================================================
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from fadapt.checkpointing import keep_adapter, watch
from fadapt.errors import AdapterError, ConfigError, near
from fadapt.lending import Lender, Scratch
from fadapt.method import Method, over, ready
from fadapt.shell import (
    AdaptedLinear,
    bias_at,
    join,
    layers_of,
    quantized,
    read,
    share,
    written_to,
)
from fadapt.trained import saved_modules, trained_biases

if TYPE_CHECKING:
    from fadapt.composition import Composed

Adapter = Mapping[str, Any]
Dropout = Tensor | torch.Generator | Mapping[str, Tensor] | None


class Forward:
    """What :func:`bind` returns: ``forward(params, *args, **kwargs)``.

    Attributes:
        method: the method that it was bound with.
        shell: the copy of the module tree that it runs.
        layers: ``{path: AdaptedLinear}``, the adapted layers of the shell.
        saved: ``{path: names of its parameters}`` of ``modules_to_save``; and ``["bias"]`` for each
            bias that is trained.
        biases: ``{path of its entry: path of the module}`` of the latter.
    """

    def __init__(
        self,
        shell: nn.Module,
        layers: Mapping[str, AdaptedLinear],
        saved: Mapping[str, Sequence[str]],
        method: Method,
        biases: Mapping[str, str] | None = None,
    ):
        self.shell = shell
        self.layers = dict(layers)
        self.biases = dict(biases or {})
        self.saved = dict(saved) | dict.fromkeys(self.biases, ("bias",))
        self.method = method
        self._bases = {path: layer.base for path, layer in self.layers.items()}
        self._lender = Lender(shell)
        for layer in self.layers.values():
            layer.lender = self._lender
        keep_adapter(shell, self._lender)
        trained = {join(p, n).rpartition(".")[0] for p, names in saved.items() for n in names}
        watch(shell, self._lender, trained | set(self.biases.values()) - self.layers.keys())
        self._paths = self.layers.keys() | self.saved.keys()
        self._fits: Any = None
        self._dtypes = {
            join(p, n): self._own(p, n).dtype for p in self.saved for n in self.saved[p]
        }
        self._moved = {join(p, "bias"): bias_at(shell, at) for p, at in self.biases.items()}
        self._scratch = Scratch(written_to(shell))

    def __repr__(self) -> str:
        return f"Forward({type(self.shell).__name__}, {len(self.layers)} layers, {self.method})"

    def __call__(
        self, params: Adapter | None, *args: Any, dropout: Dropout = None, **kwargs: Any
    ) -> Any:
        """The model's own call, adapted.

        Args:
            params: the adapter, or what :meth:`prepare` made of it; None for the base alone. A list
                of adapters acts in order, with ``weights=[...]`` if given; to call it often, bind
                a list of methods.
            *args: the model's positional inputs.
            dropout: None for no dropout. Else an int64 seed ``[]`` (see
                :func:`fadapt.dropout_seeds`; map over ``[K]`` of them for K adapters), a
                ``torch.Generator`` that one seed is drawn from, or masks ``{path: keep}``, boolean,
                each shaped as its layer's input (OFT: one element a block).
            **kwargs: the model's keyword inputs.

        Returns:
            Whatever the model returns.

        Raises:
            AdapterError: a path is missing or unknown, or a shape or dtype does not fit; or the
                forward is running in another thread.
        """
        if isinstance(params, list | tuple):
            from fadapt.composition import Composed

            composed = Composed([self] * len(params))
            return composed(params, *args, dropout=dropout, **kwargs)
        tensors = self._seeds(dropout)
        if params is not None:
            self._check(params)
            for path, leaf in ready(self.method, params, self._bases).items():
                if path in self.saved:
                    leaf = self.of_module(path, leaf)
                fields: Any = getattr(leaf, "_fields", leaf)
                for name, tensor in zip(fields, _parts(leaf), strict=True):
                    tensors[join(path, name)] = tensor
            for name, place in self._moved.items():
                tensors[place] = tensors.pop(name)
        return self.run(tensors, args, kwargs)

    def run(
        self,
        tensors: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """Call the shell, or a function that runs it, with these tensors, by name, in place of what
        it holds."""
        self._scratch.fill(tensors)
        return self._lender.call(function or self.shell, tensors, args, kwargs)

    def prepare(self, params: Adapter) -> Adapter:
        """What a method can build of an adapter once for several calls, which take it instead.

        OFT's rotations, DoRA's norms; LoRA's parameters as they are. Differentiable.

        Raises:
            AdapterError: as a call does.
        """
        self._check(params)
        return self.method.prepare(params, self._bases)

    def of_module(self, path: str, leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One entry of ``saved``, in the dtypes that the model has there."""
        return {name: t.to(self._dtypes[join(path, name)]) for name, t in leaf.items()}

    def _check(self, params: Adapter) -> None:
        if not isinstance(params, Mapping):
            raise AdapterError(
                f"expected an adapter, {{path: parameters}}, got a {type(params).__name__}. A "
                "forward takes the adapter first, then the model's inputs: forward(params, x); "
                "forward(None, x) is the base alone."
            )
        form = form_of(params)
        if form is not None and form == self._fits:
            return
        expected = self._paths
        if params.keys() != expected:
            missing, unknown = expected - params.keys(), params.keys() - expected
            hint = near(min(unknown), expected) if unknown else ""
            raise AdapterError(
                f"the adapter's paths are not those that were bound: {len(missing)} missing "
                f"{sorted(missing)[:4]}, {len(unknown)} unknown {sorted(unknown)[:4]}.{hint} Bind "
                "with the method that the adapter was made with."
            )
        for path, layer in self.layers.items():
            odd = [type(part) for part in _parts(params[path]) if not isinstance(part, Tensor)]
            if odd:
                raise AdapterError(
                    f"layer {path!r}: parameters are tensors, and one is a {odd[0].__name__}."
                )
            layer.method.check(layer.base, params[path], path)
        for path, names in self.saved.items():
            if set(params[path]) != set(names):
                raise AdapterError(
                    f"module {path!r} is trained itself: expected the parameters {list(names)}, "
                    f"got {sorted(params[path])}."
                )
            for name in names:
                own, given = self._own(path, name), params[path][name]
                if given.shape != own.shape or not given.is_floating_point():
                    raise AdapterError(
                        f"module {path!r} is trained itself: expected {name} {list(own.shape)}, of "
                        f"a floating dtype, got {given.dtype} {list(given.shape)}."
                    )
        self._fits = form

    def _own(self, path: str, name: str) -> Tensor:
        """What the shell itself holds where an entry of ``saved`` goes."""
        if path not in self.biases:
            return self.shell.get_parameter(join(path, name))
        held: Any = self.shell.get_submodule(self.biases[path])
        bias: Any = held.base.bias if isinstance(held, AdaptedLinear) else held.bias
        return bias  # type: ignore[no-any-return]

    def _seeds(self, dropout: Dropout) -> dict[str, Tensor]:
        if dropout is None:
            return {}
        if self.method.dropout == 0:
            raise ConfigError("dropout= was given, but the method's dropout is 0.")
        # An embedding has none: an id has no element that could be zeroed.
        dropped = [path for path, layer in self.layers.items() if layer.method.dropout]
        if not dropped:
            raise ConfigError(
                "dropout= was given, and no adapted layer but embeddings, without it."
            )
        if isinstance(dropout, Mapping):
            if dropout.keys() != set(dropped):
                odd = sorted(dropout.keys() ^ set(dropped))
                raise AdapterError(f"dropout masks: one a layer is needed; not so for {odd[:4]}.")
            return {join(path, "dropout_keep"): keep for path, keep in dropout.items()}
        if isinstance(dropout, torch.Generator):
            if torch._C._are_functorch_transforms_active():
                raise ConfigError(
                    "inside a torch.func transform a generator would give every adapter one mask: "
                    "draw seeds outside, fadapt.dropout_seeds(generator, K), and map over them."
                )
            dropout = torch.randint(0, 2**31, (), generator=dropout, device=dropout.device)
        if not isinstance(dropout, Tensor) or dropout.dim() or dropout.dtype != torch.int64:
            tensor = isinstance(dropout, Tensor)
            got = f"{dropout.dtype} {list(dropout.shape)}" if tensor else repr(dropout)
            raise AdapterError(
                f"dropout: expected one seed, torch.int64 [], a generator or masks by path; got "
                f"{got}. fadapt.dropout_seeds(generator) draws a seed, and of K of them each call "
                "takes one: torch.func.vmap(forward, ...)."
            )
        return {join(path, "dropout_seed"): dropout for path in dropped}


@overload
def bind(
    model: nn.Module, method: Method, state: Mapping[str, Tensor] | None = None
) -> Forward: ...


@overload
def bind(
    model: nn.Module, method: Sequence[Method], state: Mapping[str, Tensor] | None = None
) -> "Composed": ...


def bind(model: nn.Module, method: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """A pure forward of ``model`` with the adapters of ``method``.

    It shares every tensor with the model, detached: no gradient ever reaches the model. Modes
    (train or eval) are the model's at the time of binding. What a forward writes to its buffers,
    and to tensors that are a module's plain attributes (alone, or in a list, tuple or dict), is
    written in copies and forgotten. A ``Forward`` runs in one thread at a time (each call lends the
    shell its tensors): bind one for each thread.

    Args:
        model: any ``nn.Module``; left as it is.
        method: which layers, and how. A list of methods gives a forward that takes a list of
            adapters, which act in order (:class:`fadapt.composition.Composed`).
        state: ``{name: tensor}`` that stand in for the model's own parameters and buffers: the
            residual state that PiSSA and OLoRA return, or a merged state.

    Returns:
        ``forward(params, *args, **kwargs)``; see :class:`Forward`.

    Raises:
        TargetError: patterns and layers do not meet (see :func:`fadapt.targets.find_targets`).
        UnsupportedLayerError: a target has no base.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
        >>> method = fadapt.LoRA(rank=2)
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> forward = fadapt.bind(model, method)
        >>> x = torch.ones(3, 4)
        >>> torch.equal(forward(params, x), model(x))
        True
    """
    if isinstance(method, list | tuple):
        from fadapt.composition import compose

        return compose(model, method, state)
    targets = layers_of(model, method)
    shell = share(model, state or {})
    names = {id(m): path for path, m in targets.items()}
    at = method.at(list(targets))
    saved = saved_modules(model, method)
    layers: dict[str, AdaptedLinear] = {}
    frozen: dict[int, AdaptedLinear] = {}
    for alias, module in model.named_modules(remove_duplicate=False):
        path = names.get(id(module))
        if path is None:
            below = any(f"{alias}.".startswith(f"{p}.") for p in (*saved, *names.values()))
            held = None if below or not alias else quantized(shell.get_submodule(alias))
            if held is not None:
                layer = shell.get_submodule(alias)
                kept = frozen.setdefault(id(module), AdaptedLinear(layer, held, method, alias))
                shell.set_submodule(alias, kept)
            continue
        if path not in layers:
            layer = shell.get_submodule(alias)
            base = read(path, layer)
            layers[path] = AdaptedLinear(layer, base, over(base, at[path], path), path)
        if alias:
            shell.set_submodule(alias, layers[path])
        else:
            shell = layers[path]
    bases = {path: layer.base for path, layer in layers.items()}
    return Forward(shell, layers, saved, method, trained_biases(model, method, bases))


def form_of(params: Adapter) -> Any:
    """All that a check of ``params`` reads: paths, types, shapes and dtypes. What passed once need
    not be checked again. None where the shapes are a tracer's, which are not to be kept."""
    if torch.compiler.is_compiling():
        return None
    form: list[Any] = []
    for path, leaf in params.items():
        form += path, type(leaf)
        if not isinstance(leaf, tuple) and isinstance(leaf, Mapping):
            form += leaf
        for part in _parts(leaf):
            form += (part.shape, part.dtype) if isinstance(part, Tensor) else (type(part),)
    return form


def _parts(leaf: Any) -> Iterable[Any]:
    """The tensors of one layer's parameters."""
    if isinstance(leaf, tuple):
        return leaf
    return leaf.values() if isinstance(leaf, Mapping) else ()
