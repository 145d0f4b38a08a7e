"""DoRA: PEFT's own numbers, the norm by blocks, merging that keeps the magnitude."""

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa
import fadapt.dora
from fadapt.errors import AdapterError, ConfigError
from fadapt.testing import assert_pure

pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")

EPS = torch.finfo(torch.float32).eps


def model_of(base: str = "dense", width: int = 12) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 6))
    if base == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    return model


def gaussian(shape: Any, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(method: fa.DoRA, model: nn.Module, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    fresh = fa.init(method, model, generator=g)
    return tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=g).to(t), fresh)


def put(wrapped: Any, params: Any) -> None:
    for path, leaf in params.items():
        layer = wrapped.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(leaf.lora_A)
        layer.lora_B["default"].weight.data.copy_(leaf.lora_B)
        layer.lora_magnitude_vector["default"].weight.data.copy_(leaf.lora_magnitude)


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_peft_outputs_and_gradients(base: str):
    model, method = model_of(base), fa.DoRA(rank=3, alpha=5)
    params = drawn(method, model)
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["0", "2"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    fresh = wrapped.base_model.model[0].lora_magnitude_vector["default"].weight
    norms = fa.init(method, model, generator=torch.Generator().manual_seed(0))["0"].lora_magnitude
    assert (fresh - norms).abs().max() <= 12 * EPS * norms.max()
    put(wrapped, params)
    forward, x = fa.bind(model, method), gaussian((5, 12))
    want = wrapped(x)
    # Sums of a dozen products, a norm and a quotient a layer, in another order.
    assert (forward(params, x) - want).abs().max() <= 64 * EPS * want.abs().max()
    want.square().mean().backward()
    grads = grad(lambda p: forward(p, x).square().mean())(params)
    for path, leaf in grads.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for name, got in leaf._asdict().items():
            name = "lora_magnitude_vector" if name == "lora_magnitude" else name
            theirs = getattr(layer, name)["default"].weight.grad
            assert (got - theirs).abs().max() <= 256 * EPS * theirs.abs().max()
    if base == "dense":  # PEFT's merge into int8 loses the magnitude, or raises
        merged = wrapped.merge_and_unload()
        for path, leaf in params.items():
            ours = method.merge(fa.base_of(model.get_submodule(path)).dequantize(), leaf)
            assert (ours - merged.get_submodule(path).weight).abs().max() <= 64 * EPS


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_the_merged_layer_has_the_learned_magnitudes(base: str):
    layer, method = model_of(base)[0], fa.DoRA(rank=3, alpha=5)
    params = drawn(method, layer)
    at = fa.base_of(layer)
    merged = method.merge(at.dequantize(), params[""])
    norms = merged.norm(dim=1)
    assert (norms - params[""].lora_magnitude.abs()).abs().max() <= 12 * EPS * norms.max()
    x = gaussian((5, 12))
    want = x @ merged.mT + at.bias
    y = fa.bind(layer, method)(params, x)
    assert (y - want).abs().max() <= 64 * EPS * want.abs().max()
    assert torch.equal(merged[2:5], method.merge(at.dequantize()[2:5], params[""], slice(2, 5)))


class Watched(fa.Dense):
    """Tells how many rows are dequantized at a time."""

    seen: list[int]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        self.seen.append(self.out_features)
        return super().dequantize(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(5, 13),  # fewer inputs are not cut
    st.integers(1, 7),
    st.integers(1, 4),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.integers(0, 99),
)
def test_the_norm_by_blocks(n_in: int, n_out: int, rank: int, size: float, seed: int):
    method = fa.DoRA(rank=rank, alpha=2 * rank)
    W, A, B = (
        gaussian(s, seed + k) for k, s in enumerate([(n_out, n_in), (rank, n_in), (n_out, rank)])
    )
    params = fa.DoRAParams(A, size * B, torch.ones(n_out))
    base, held, seen = Watched(W), fadapt.dora._BLOCK_BYTES["cpu"], []
    Watched.seen = seen
    fadapt.dora._BLOCK_BYTES["cpu"] = 4 * n_in * 2  # two rows a block
    try:
        got = method.norm(base, params)
    finally:
        fadapt.dora._BLOCK_BYTES["cpu"] = held
    assert max(seen) <= 2
    assert sum(seen) == n_out
    delta = 2 * params.lora_B.double() @ A.double()
    want = (W.double() + delta).norm(dim=1)
    # Squares are added, so the error is relative to the parts, not to what is left of them.
    parts = (
        W.double().norm(dim=1) + 2 * params.lora_B.double().abs() @ A.double().norm(dim=1)
    ) ** 2
    assert ((got.double() ** 2 - want**2).abs() <= 8 * (n_in + rank) * EPS * parts).all()


def test_the_norm_is_a_constant_to_derivatives(monkeypatch: pytest.MonkeyPatch):
    model, method = model_of(), fa.DoRA(rank=2)
    params, x = drawn(method, model), gaussian((5, 12))
    forward = fa.bind(model, method)
    prepared = forward.prepare(params)
    assert torch.equal(forward(prepared, x), forward(params, x))
    ours = grad(lambda p: forward(p, x).sum())(params)
    monkeypatch.delattr(fa.DoRA, "norm")  # what was prepared holds it: none is taken again
    fixed = grad(lambda p: forward(p, x).sum())(prepared)
    for path, leaf in ours.items():
        assert all(torch.equal(getattr(leaf, n), getattr(fixed[path], n)) for n in leaf._fields)


def test_the_norm_under_autocast_is_that_of_the_merged_weight():
    model, method = model_of(), fa.DoRA(rank=4)
    forward, params = fa.bind(model, method), drawn(method, model)
    want = forward.prepare(params)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward.prepare(params)
    for path, leaf in want.items():
        assert torch.equal(found[path].norm, leaf.norm)


def test_unmerge_takes_the_norms():
    layer, method = model_of()[0], fa.DoRA(rank=3)
    params = drawn(method, layer)
    prepared = fa.bind(layer, method).prepare(params)[""]
    W = layer.weight.detach()
    merged = assert_pure(lambda: method.merge(W, prepared), W, prepared)
    assert (method.unmerge(merged, prepared) - W).abs().max() <= 64 * EPS
    with pytest.raises(AdapterError, match=r"forward\.prepare"):
        method.unmerge(merged, params[""])
    nothing = prepared._replace(lora_magnitude=torch.zeros(8))
    with pytest.raises(AdapterError, match="nothing is left"):
        method.unmerge(merged, nothing)


def test_a_row_of_zeros_stays_finite_and_starts_as_the_base():
    layer, method = nn.Linear(12, 4), fa.DoRA(rank=2)
    layer.weight.data[1] = 0
    params = fa.init(method, layer, generator=torch.Generator().manual_seed(0))
    forward, x = fa.bind(layer, method), gaussian((5, 12))
    assert torch.equal(forward(params, x), layer(x))
    grads = grad(lambda p: forward(p, x).sum())(params)
    assert all(g.isfinite().all() for g in grads[""])
    assert torch.equal(method.merge(layer.weight.detach(), params[""])[1], torch.zeros(12))


def test_dropout_acts_on_the_update_alone():
    layer, method = model_of()[0], fa.DoRA(rank=2, dropout=0.5)
    params, x = drawn(method, layer), gaussian((5, 12))
    forward = fa.bind(layer, method)
    keep = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    leaf = params[""]
    norm = method.norm(fa.base_of(layer), leaf)
    update = (x * keep * 2) @ leaf.lora_A.mT @ leaf.lora_B.mT
    want = (leaf.lora_magnitude / norm) * (x @ layer.weight.detach().mT + update) + layer.bias
    y = forward(params, x, dropout={"": keep})
    assert (y - want).abs().max() <= 64 * EPS * want.abs().max()
    seeds = fa.dropout_seeds(torch.Generator().manual_seed(0), 3)
    ys = vmap(lambda s: forward(params, x, dropout=s))(seeds)
    assert (ys[0] - ys[1]).abs().max() > 1e-2


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
def test_other_initialisations_change_nothing_either(init: str):
    model, method = model_of(), fa.DoRA(rank=2, init=init)
    made = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params, state = made if isinstance(made, tuple) else (made, None)
    x = gaussian((5, 12))
    y = fa.bind(model, method, state=state)(params, x)
    # PiSSA and OLoRA: W = residual + s B A, rounded once more.
    assert (y - model(x)).abs().max() <= 64 * EPS


def test_errors():
    with pytest.raises(ConfigError, match="lora_bias"):
        fa.DoRA(lora_bias=True)
    layer, method = nn.Linear(12, 4), fa.DoRA(rank=2)
    forward, x = fa.bind(layer, method), torch.ones(12)
    A, B, m = torch.zeros(2, 12), torch.zeros(4, 2), torch.zeros(4)
    for leaf, words in (
        (fa.LoRAParams(A, B), "expected DoRAParams"),
        (fa.DoRAParams(A, B, m[:3]), r"lora_magnitude \[4\], got \[3\]"),
        (fa.DoRAParams(A, B.T, m), r"lora_B \[4, r\]"),
        (fa.DoRANormed(A, B, m, m[:2]), r"norm \[4\]"),
        (fa.DoRAParams(A, B, m.long()), "must be floating"),
    ):
        with pytest.raises(AdapterError, match=words):
            forward({"": leaf}, x)


def test_a_row_of_few_numbers_that_the_update_all_but_cancels_keeps_its_digits():
    W, A, B = torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[-3.0 + 2**-12]])
    norm = fa.DoRA(rank=1).norm(fa.Dense(W), fa.DoRAParams(A, B, torch.ones(1)))
    assert norm == 2**-12
