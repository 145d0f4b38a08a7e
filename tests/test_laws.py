"""Laws 1 to 4 and 8 of every base x method x transform. The rows are in cases.py.

The transforms, and what each is held to, are in transforms.py.
"""

import pytest
import torch
from cases import (
    BASES,
    DEVICE,
    F64,
    METHODS,
    N_HIDDEN,
    N_IN,
    N_OUT,
    BaseRow,
    K,
    MethodRow,
    dense,
    eps_of,
    make,
    randomized,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transforms import TRANSFORMS, error, loss

import fadapt as fa
from fadapt.errors import AdapterError
from fadapt.testing import assert_pure

TABLE = [pytest.param(b, m, id=f"{b.name}-{m.name}") for b in BASES for m in METHODS]
table = pytest.mark.parametrize(("row", "kind"), TABLE)
# A GPU's products of one row and of several differ in the order of their sums, a CPU's of this size
# do not: an eps more, grown likewise.
LOOSER = 1 if DEVICE == "cpu" else 2


def step_of(row: BaseRow) -> float:
    """For the same reason the second layer's input may there fall to the next of 255 steps."""
    return 1 / 127 if row.rounds and DEVICE != "cpu" else 0.0


@pytest.mark.parametrize("name", TRANSFORMS)
@table
def test_transform(row: BaseRow, kind: MethodRow, name: str):
    c = make(row, kind)
    got, want, order = TRANSFORMS[name]
    # Law 8: a transform leaves its inputs, the model and all global state as they were.
    value = assert_pure(lambda: got(c), c.model, c.forward, c.params, c.many, c.x, c.xs)
    # Two layers, and for each order of derivative two more on the way back; every result, of 16
    # products at most, is rounded to the row's dtype: eps / 2 each, grown by the next layers.
    share = error(value, want(c))
    assert share <= (4, 8, 16)[order] * eps_of(row) * LOOSER + step_of(row)


@table
def test_law_1_a_fresh_adapter_changes_nothing(row: BaseRow, kind: MethodRow):
    c = make(row, kind)
    fresh = fa.init(c.method, c.model, generator=torch.Generator().manual_seed(5))
    assert torch.equal(c.forward(fresh, c.x), c.forward(None, c.x))
    ys = vmap(c.forward)(fa.stack([fresh] * K), c.xs)
    assert torch.equal(ys, vmap(lambda x: c.forward(None, x))(c.xs))


@pytest.mark.parametrize("row", BASES, ids=lambda b: b.name)
def test_law_2_without_an_adapter_it_is_the_model_itself(row: BaseRow):
    layer = row.layer(N_IN, N_HIDDEN).to(DEVICE)
    forward = fa.bind(layer, METHODS[0].method)
    g = torch.Generator().manual_seed(0)
    for shape in ((N_IN,), (1, N_IN), (5, N_IN), (2, 3, N_IN), (0, N_IN)):
        x = torch.randn(shape, generator=g).to(DEVICE, row.dtype)
        got = assert_pure(lambda: forward(None, x), layer, forward, x)
        assert got.dtype == row.dtype
        assert got.shape == (*shape[:-1], N_HIDDEN)
        if not x.numel():  # which some vendors' layers refuse
            continue
        with torch.no_grad():
            want = row.vendor(layer, x)
        if row.bound == 0:
            assert torch.equal(got, want)
        else:
            assert error(got, want) <= row.bound


@pytest.mark.parametrize("row", BASES, ids=lambda b: b.name)
def test_an_input_of_integers_is_refused(row: BaseRow):
    base = fa.base_of(row.layer(N_IN, N_HIDDEN).to(DEVICE))
    x = torch.ones(2, N_IN, dtype=torch.int64, device=DEVICE)
    # A dense layer on a GPU makes torch's own call, which refuses too.
    with pytest.raises(AdapterError if DEVICE == "cpu" else (AdapterError, RuntimeError)):
        base.linear(x)


@pytest.mark.parametrize("row", BASES, ids=lambda b: b.name)
def test_a_base_is_a_pytree_that_vmap_maps_over(row: BaseRow):
    base = fa.base_of(row.layer(N_IN, N_HIDDEN).to(DEVICE))
    numbers = tree_map(lambda t: 0, base)
    assert tree_leaves(numbers) == [0] * len(tree_leaves(base))
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(0)).to(DEVICE, row.dtype)
    ys = vmap(lambda b: b.linear(x))(tree_map(lambda t: torch.stack([t, t]), base))
    assert error(ys, torch.stack([base.linear(x)] * 2)) <= 2 * eps_of(row)


@pytest.mark.parametrize("row", BASES, ids=lambda b: b.name)
def test_rows_are_the_base_of_some_rows_and_share_its_tensors(row: BaseRow):
    base = fa.base_of(row.layer(N_IN, N_HIDDEN).to(DEVICE))
    for rows in (slice(0, 4), slice(4, 8), slice(None)):
        part = base.rows(rows)
        assert torch.equal(part.dequantize(), base.dequantize()[rows])
        assert torch.equal(part.bias, base.bias[rows])
        assert part.in_features == N_IN
        assert part.out_features == len(range(N_HIDDEN)[rows])
        whole = {t.untyped_storage().data_ptr() for t in tree_leaves(base)}
        assert {t.untyped_storage().data_ptr() for t in tree_leaves(part)} <= whole
        x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(0)).to(DEVICE, row.dtype)
        assert error(part.linear(x), base.linear(x)[:, rows]) <= 2 * eps_of(row)


@table
def test_law_3_vmap_is_the_loop_and_unstack_inverts_stack(row: BaseRow, kind: MethodRow):
    c = make(row, kind)
    adapters = fa.unstack(c.many)
    again = fa.stack(adapters)
    assert all(map(torch.equal, tree_leaves(again), tree_leaves(c.many)))
    ys = vmap(c.forward)(c.many, c.xs)
    grads = fa.unstack(vmap(grad(loss(c.forward)))(c.many, c.xs))
    for p, x, y, g in zip(adapters, c.xs, ys, grads, strict=True):
        # The same sums, in one GEMM of K x 3 rows instead of K of 3: another order, so an eps.
        assert error(y, c.forward(p, x)) <= 4 * eps_of(row) + step_of(row)
        assert error(g, grad(loss(c.forward))(p, x)) <= 8 * eps_of(row) + step_of(row)


@pytest.mark.parametrize("kind", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("row", [b for b in BASES if b.gradcheck], ids=lambda b: b.name)
def test_law_4_gradcheck_in_float64(row: BaseRow, kind: MethodRow):
    layer = row.layer(N_HIDDEN, 4).to(DEVICE)
    forward = fa.bind(layer, kind.method)
    fresh = fa.init(kind.method, layer, generator=torch.Generator().manual_seed(0))
    params = tree_map(lambda t: t.double(), randomized(fresh, 0))
    leaves, spec = tree_flatten(forward.prepare(params) if kind.detached else params)
    x = torch.randn(2, N_HIDDEN, generator=torch.Generator().manual_seed(1)).to(DEVICE, F64)
    inputs = [t.requires_grad_() for t in (x, *leaves)]

    def f(x: Tensor, *leaves: Tensor) -> Tensor:
        return forward(tree_unflatten(list(leaves), spec), x)

    assert gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", METHODS, ids=lambda m: m.name)
def test_law_7_applying_is_multiplying_by_the_merged_weight(kind: MethodRow):
    layer = dense(N_IN, N_OUT, F64).to(DEVICE)
    base, method = fa.base_of(layer), kind.method
    fresh = fa.init(method, layer, generator=torch.Generator().manual_seed(0))
    (p,) = tree_map(lambda t: t.double(), randomized(fresh, 0)).values()
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1)).to(DEVICE, F64)
    want = x @ method.merge(base.dequantize(), p).mT + method.merge_bias(base.bias, p)
    assert error(method.apply(base, p, x), want) <= 16 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("row", BASES, ids=lambda row: row.name)
def test_inputs_and_gradients_of_any_strides(row):
    base, g = fa.base_of(row.layer(N_IN, N_HIDDEN).to(DEVICE)), torch.Generator().manual_seed(0)
    x = torch.randn(3, 2 * N_IN, generator=g).to(DEVICE, row.dtype)[:, :N_IN]
    back = torch.randn(N_HIDDEN, 3, generator=g).to(DEVICE, row.dtype).mT
    y, pull = torch.func.vjp(base.linear, x)
    want, straight = torch.func.vjp(base.linear, x.contiguous())
    eps = 4 * eps_of(row)  # a product of another layout may sum in another order
    assert error(y, want) <= eps
    assert error(pull(back), straight(back.contiguous())) <= eps
