"""A mixed batch traced by ``torch.export``: ids, the model's inputs and the bank become the
program's inputs."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from fadapt.batching import Mixed
from fadapt.errors import ConfigError

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # slow to import, and it registers loggers

Axes = Mapping[str, Mapping[int, str]]
# (the model's call, its inputs by name) -> what the graph returns.
Call = Callable[[Callable[..., Any], dict[str, Tensor]], Any]
PAST = "past"  # the only axis that may be empty
LARGEST = 2**20  # of any dynamic axis
_ADAPTERS, _RANK = 3, 5  # of the example
_RANK_AXES = {"lora_A": 1, "lora_B": 2}  # [K, r, in] and [K, out, r]; of others K alone is free


class _Graph(nn.Module):
    """The call that is exported: ids, then the model's inputs, then the bank's leaves."""

    def __init__(self, mixed: Mixed, names: Sequence[str], bank: Any, spec: Any, call: Call):
        super().__init__()
        self.shell = mixed.shell  # so that the weights are the program's own
        self.mixed, self.names, self.spec, self.call = [mixed], names, spec, call
        self.held = [bank]

    def forward(self, ids: Tensor, inputs: list[Tensor], leaves: list[Tensor]) -> Any:
        bank = tree_unflatten(leaves, self.spec) if leaves else self.held[0]

        def run(**given: Any) -> Any:
            return self.mixed[0](bank, ids, **given)

        return self.call(run, dict(zip(self.names, inputs, strict=True)))


def check_axes(inputs: Mapping[str, Tensor], dynamic: Axes) -> dict[str, int]:
    """``{axis: its size in the example}``.

    Raises:
        ConfigError: an input or an axis that is not there, a size below 2, no axis ``"batch"``.
    """
    sizes: dict[str, int] = {}
    for key, at in dynamic.items():
        if key not in inputs:
            raise ConfigError(f"dynamic= names the input {key!r}; the inputs are {list(inputs)}.")
        for k, name in at.items():
            if not 0 <= k < inputs[key].dim():
                raise ConfigError(f"{key} {list(inputs[key].shape)} has no axis {k}, {name!r}.")
            sizes[name] = inputs[key].shape[k]
    if "batch" not in sizes or min(sizes.values()) < 2:
        raise ConfigError(
            f"the dynamic axes of the example have the sizes {sizes}: each must be at least 2, and "
            "one is named 'batch', which is the ids' too."
        )
    return sizes


def trace(
    mixed: Mixed,
    bank: Any,
    inputs: Mapping[str, Tensor],
    dynamic: Axes,
    call: Call,
    bake: bool,
) -> "ExportedProgram":
    """The program ``(ids [n], [the inputs], [the bank's leaves]) -> what call returns``.

    Every dynamic axis, K and every rank may be 1 when it runs, the axis ``"past"`` 0. Of an axis
    that is a sum (``"past + sequence"``) torch.export finds out the size by itself.
    """
    from torch.export import Dim
    from torch.utils._sympy.value_ranges import ValueRanges

    sizes = check_axes(inputs, dynamic)
    found, spec = tree_flatten_with_path(bank)
    leaves = [leaf if bake else _example(key, leaf) for key, leaf in found]
    given = [] if bake else leaves
    free = (
        []
        if bake
        else [{a: Dim.DYNAMIC for a in (0, rank_axis(k)) if a is not None} for k, _ in found]
    )
    ids = torch.arange(sizes["batch"], device=leaves[0].device) % leaves[0].shape[0]
    axes = {
        name: Dim.AUTO if "+" in name else Dim(name, min=0 if name == PAST else 1, max=LARGEST)
        for name in sizes
    }
    where = [{k: axes[n] for k, n in dynamic.get(key, {}).items()} for key in inputs]
    graph = _Graph(mixed, list(inputs), bank, spec, call).eval()
    # Without gradients, so that what is rounded to integers is multiplied as integers.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export's, of the shell that functional_call lends
        program = torch.export.export(
            graph,
            (ids, [tensor.contiguous() for tensor in inputs.values()], given),
            dynamic_shapes=({0: axes["batch"]}, where, free),
            strict=False,
        )
    # An axis whose range is found out starts at 2 (a sum of two, at 4), as 1 would have been a
    # constant; those that have a Dim may start at 1, and are traced in the same way.
    starts = {2, *(2 * (name.count("+") + 1) for name in sizes)}
    for symbol, size in list(program.range_constraints.items()):
        if size.lower in starts:
            program.range_constraints[symbol] = ValueRanges(1, size.upper)
    _trim(program)
    return program


def rank_axis(key: Any) -> int | None:
    """The axis of a bank's leaf that is its rank, as free as K; None if it has none."""
    return _RANK_AXES.get(getattr(key[-1], "name", ""))


def _example(key: Any, leaf: Tensor) -> Tensor:
    """A leaf like this one, of other sizes than 1, which would be constants of the program; and of
    zeros, as a ``.pt2`` file keeps its examples."""
    sizes, axis = [_ADAPTERS, *leaf.shape[1:]], rank_axis(key)
    if axis is not None:
        sizes[axis] = _RANK
    return leaf.new_zeros(sizes)


def _trim(program: "ExportedProgram") -> None:
    """Without the tensors that nothing reads: a quantized layer's weight is in its base's tensors,
    and would be in the file twice."""
    from torch.export.graph_signature import InputKind

    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in list(program.graph.nodes):
        if node.op != "placeholder" or node.users:
            continue
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        program.graph_signature.input_specs.remove(spec)
        program.graph.erase_node(node)
        program.state_dict.pop(spec.target, None)
        program.constants.pop(spec.target, None)
    program.graph_module.recompile()
