"""torch.compile(fullgraph=True) of every transform, and torch.export: the values of eager mode."""

import pytest
import torch
from cases import BASES, METHODS, BaseRow, Case, MethodRow, eps_of, make
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transforms import TRANSFORMS, error, loss, plain_grads

import fadapt as fa
from fadapt.testing import assert_pure

TABLE = [
    pytest.param(b, m, id=f"{b.name}-{m.name}")
    for b in BASES
    for m in METHODS
    if b.compiled and m.compiled
]
table = pytest.mark.parametrize(("row", "kind"), TABLE)
COMPILED = ("call", "grad", "vmap_adapters", "vmap_of_grad", "grad_of_vmap", "jvp", "jacrev")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bound(row: BaseRow, order: int) -> float:
    # A compiled graph sums in another order: eps, as in test_laws.py. Where the activation is
    # rounded, that may take an element over the middle between two steps: one step of 255 more.
    return (4, 8, 16)[order] * eps_of(row) + (1 / 127 if row.rounds else 0)


def run(c: Case, name: str, backend: str) -> None:
    got, want, order = TRANSFORMS[name]

    def call(params, many, x, xs, tangents):
        data = (params, many, x, xs, tangents)
        return got(Case(c.row, c.method, c.model, c.forward, c.reference, *data))

    fn = torch.compile(call, fullgraph=True, backend=backend)
    share = error(fn(c.params, c.many, c.x, c.xs, c.tangents), want(c))
    assert share <= bound(c.row, order)


@pytest.mark.parametrize("name", COMPILED)
@table
def test_transform(row: BaseRow, kind: MethodRow, name: str):
    run(make(row, kind), name, "aot_eager")


@pytest.mark.parametrize("name", ["vmap_of_grad"])
@table
def test_transform_by_inductor(row: BaseRow, kind: MethodRow, name: str):
    run(make(row, kind), name, "inductor")


# The other methods, on one quantized base.
OTHERS = [m for m in METHODS if m.name in ("dora", "oft", "oft-neumann")]


@pytest.mark.parametrize("name", ["vmap_of_grad", "jvp"])
@pytest.mark.parametrize("kind", OTHERS, ids=lambda m: m.name)
def test_transform_of_other_methods(kind: MethodRow, name: str):
    (row,) = (b for b in BASES if b.name == "int8-row-f32")
    c = make(row, kind)
    # A copy: under torch 2.13's compiler the jvp of a reshape of a slice is an internal error.
    run(c._replace(x=c.x.clone()), name, "aot_eager")


@table
def test_plain_backward_through_a_compiled_forward(row: BaseRow, kind: MethodRow):
    c = make(row, kind)
    fn = torch.compile(loss(c.forward), fullgraph=True, backend="aot_eager")
    share = error(plain_grads(fn, c.params, c.x), plain_grads(loss(c.reference), c.params, c.x))
    assert share <= bound(row, 1)


def test_a_training_step_compiles_once_for_all_adapters_and_steps():
    c = make(*TABLE[1].values)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def step(p, x):
        return tree_map(lambda w, g: w - 0.1 * g, p, grad(loss(c.forward))(p, x))

    fn = torch.compile(vmap(step), fullgraph=True, backend=count)
    many, want = c.many, c.many
    for _ in range(3):
        many, want = fn(many, c.xs), vmap(step)(want, c.xs)
    assert graphs == 1
    assert error(many, want) <= 3 * bound(c.row, 1)


# functional_call lends the shell its tensors while it runs; strict export sees that, and that they
# are given back (assert_pure does as well).
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
@table
def test_export_with_a_dynamic_batch(row: BaseRow, kind: MethodRow, strict: bool):
    c = make(row, kind)
    leaves, spec = tree_flatten(c.params)

    class Adapted(torch.nn.Module):
        def forward(self, x, *leaves):
            return c.forward(tree_unflatten(list(leaves), spec), x)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "leaves": tuple({} for _ in leaves)}
    program = assert_pure(
        lambda: torch.export.export(
            Adapted(), (c.x, *leaves), dynamic_shapes=shapes, strict=strict
        ),
        c.model,
        c.forward,
        c.x,
        leaves,
    )
    module = program.module()
    for x in (c.x, c.xs.flatten(0, 1)[:7]):
        assert error(module(x, *leaves), c.forward(c.params, x)) <= bound(row, 0)
    others = tree_flatten(fa.unstack(c.many)[1])[0]
    assert error(module(c.x, *others), c.forward(fa.unstack(c.many)[1], c.x)) <= bound(row, 0)
