"""combine() against PEFT's add_weighted_adapter, and what PEFT has no form of."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.func import grad
from torch.utils._pytree import tree_map

import fadapt as fa
from fadapt.combine import COMBINATIONS
from fadapt.errors import AdapterError, ConfigError
from fadapt.testing import assert_pure

EPS = torch.finfo(torch.float32).eps
METHODS = (
    fa.LoRA(rank=3, alpha=6, targets=["0", "2"]),
    fa.LoRA(rank=3, alpha=1, rslora=True, targets=["0"]),
    fa.LoRA(rank=3, alpha=2, targets=["2", "0"]),
)
WEIGHTS = [0.7, -0.4, 1.3]


def model_of() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


def drawn(method: fa.LoRA, model: nn.Module, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    fresh = fa.init(method, model, generator=g)
    return tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=g), fresh)


def theirs(model: nn.Module, adapters: Any, methods: Any, **options: Any) -> Any:
    """``{path: (A, B)}`` of PEFT's combined adapter."""
    wrapped = None
    for k, (params, method) in enumerate(zip(adapters, methods, strict=True)):
        config = peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            use_rslora=method.rslora,
            target_modules=list(method.targets),
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="0")
        else:
            wrapped.add_adapter(str(k), config)
        for path, leaf in params.items():
            layer = wrapped.base_model.model.get_submodule(path)
            layer.lora_A[str(k)].weight.data = leaf.lora_A.clone()
            layer.lora_B[str(k)].weight.data = leaf.lora_B.clone()
    names = [str(k) for k in range(len(adapters))]
    with torch.random.fork_rng(devices=[]):
        # add_weighted_adapter first draws the new adapter's own start: its masks come after that.
        wrapped.base_model.inject_adapter = _reseeding(wrapped.base_model.inject_adapter)
        wrapped.add_weighted_adapter(names, WEIGHTS, "new", **options)
    layers = {p: wrapped.base_model.model.get_submodule(p) for p in ("0", "2")}
    return {
        p: (at.lora_A["new"].weight.data, at.lora_B["new"].weight.data) for p, at in layers.items()
    }


def _reseeding(inject: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(5)

    return run


CASES = [
    *((name, {}) for name in ("linear", "cat", "svd")),
    ("svd", {"rank": 2, "clamp": 0.9}),
    *((name, {"density": 0.4}) for name in COMBINATIONS if name not in ("linear", "cat", "svd")),
    *((f"ties{end}", {"density": 0.6, "majority_sign": "frequency"}) for end in ("", "_svd")),
    ("magnitude_prune", {"density": 0.0}),
]
RENAMED = {"rank": "svd_rank", "clamp": "svd_clamp", "majority_sign": "majority_sign_method"}


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{len(o)}" for n, o in CASES])
def test_equal_to_pefts(name: str, options: Any):
    model = model_of()
    adapters = [drawn(m, model, k) for k, m in enumerate(METHODS)]
    given = dict(options)
    if name.startswith("dare"):
        given["generator"] = torch.Generator().manual_seed(5)
    else:
        assert_pure(lambda: fa.combine(adapters, WEIGHTS, name, methods=METHODS, **given), adapters)
    combined, method = fa.combine(adapters, WEIGHTS, name, methods=METHODS, **given)
    want = theirs(
        model, adapters, METHODS,
        combination_type=name, **{RENAMED.get(k, k): v for k, v in options.items()},
    )  # fmt: skip
    assert method.scaling == 1
    for path, (A, B) in want.items():
        delta = B @ A
        got = combined[path].lora_B @ combined[path].lora_A
        # Products of a dozen elements, of size 10 at most; an SVD's factors are unique up to sign.
        assert (got - delta).abs().max() <= 32 * EPS * max(1.0, float(delta.abs().max()))
        if not name.endswith("svd") and name != "cat":
            assert (combined[path].lora_A - A).abs().max() <= 4 * EPS * A.abs().max()
    fa.bind(model, method)(combined, torch.ones(12))


def test_cat_and_svd_of_full_rank_are_the_weighted_sum_of_outputs():
    model = model_of()
    methods = (fa.LoRA(rank=2, alpha=5), fa.LoRA(rank=4, alpha=1, targets=["2"]))
    adapters = [drawn(m, model, k) for k, m in enumerate(methods)]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    outputs = []
    for name, options in (("cat", {}), ("svd", {"rank": 6})):
        combined, method = fa.combine(adapters, [0.5, -2.0], name, methods=methods, **options)
        for path, leaf in combined.items():
            want = 0.5 * 2.5 * adapters[0][path].lora_B @ adapters[0][path].lora_A
            if path in adapters[1]:
                want = want - 2 * 0.25 * adapters[1][path].lora_B @ adapters[1][path].lora_A
            assert (leaf.lora_B @ leaf.lora_A - want).abs().max() <= 32 * EPS * want.abs().max()
        outputs.append(fa.bind(model, method)(combined, x))
    assert (outputs[0] - outputs[1]).abs().max() <= 64 * EPS * outputs[0].abs().max()


def test_without_methods_every_scaling_is_one():
    model, method = model_of(), fa.LoRA(rank=3, targets=["0", "2"])
    adapters = [drawn(method, model, k) for k in range(2)]
    combined = fa.combine(adapters, [1.0, 2.0], "ties", density=0.5)
    again, _ = fa.combine(adapters, [1.0, 2.0], "ties", density=0.5, methods=method)
    assert all(torch.equal(combined[p].lora_A, again[p].lora_A) for p in combined)


@pytest.mark.parametrize("name", ["linear", "cat", "ties", "svd"])
def test_weights_can_be_learned(name: str):
    model, method = model_of(), fa.LoRA(rank=3, targets=["0", "2"])
    adapters = [drawn(method, model, k) for k in range(2)]
    forward, x = fa.bind(model, method), torch.ones(12)
    options = {"density": 0.5} if name == "ties" else {}

    def loss(w: torch.Tensor) -> torch.Tensor:
        return forward(fa.combine(adapters, w, name, **options), x).square().sum()

    w = torch.tensor([0.6, 0.3], dtype=torch.float64)
    slope = grad(loss)(w)
    for k in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[k] = 1e-2
        # Float32 outputs of order 1 over a step of 2e-2, and a third derivative of order 10.
        numeric = (loss(w + step) - loss(w - step)) / 2e-2
        assert abs(slope[k] - numeric) <= 2e-2 * max(1.0, abs(float(numeric)))


def test_dare_keeps_the_mean():
    adapter = {"": fa.LoRAParams(torch.ones(50, 40), torch.ones(40, 50))}
    g = torch.Generator().manual_seed(0)
    out = fa.combine([adapter], [1.0], "dare_linear", density=0.25, generator=g)[""]
    assert set(out.lora_A.unique().tolist()) == {0.0, 4.0}
    # 2000 draws of 0 or 4, mean 1: a standard deviation of 0.039.
    assert abs(float(out.lora_A.mean()) - 1) < 0.16
    half = {"": fa.LoRAParams(*(t.bfloat16() for t in adapter[""]))}
    assert fa.combine([half], [0.3], "linear")[""].lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "mean"}, "must be one of"),
        ({"method": "ties"}, "needs density"),
        ({"method": "ties", "density": 1.5}, "needs density"),
        ({"method": "dare_ties", "density": 0.0}, r"in \(0, 1\]"),
        ({"method": "dare_ties", "density": 0.5}, "draws random numbers"),
        ({"method": "linear", "density": 0.5}, "does not use it"),
        ({"method": "cat", "rank": 3}, "does not use it"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "svd", "clamp": 2.0}, "quantile"),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "total or frequency"),
        ({"methods": fa.DoRA()}, "takes LoRA, not DoRA"),
    ],
)
def test_options_that_do_not_fit(arguments: Any, words: str):
    adapter = {"": fa.LoRAParams(torch.ones(2, 4), torch.ones(3, 2))}
    with pytest.raises(ConfigError, match=words):
        fa.combine([adapter], [1.0], **arguments)


def test_adapters_that_do_not_fit():
    def leaf(rank: int, width: int = 4) -> Any:
        return {"": fa.LoRAParams(torch.ones(rank, width), torch.ones(3, rank))}

    for adapters, words in (
        ([leaf(2), leaf(3)], "ranks .2, 3. differ"),
        ([leaf(2), leaf(2, 5)], "different sizes"),
        ([leaf(2)], "a weight for each"),
        ([{"": {"weight": torch.ones(2)}}, leaf(2)], "a module trained whole"),
        ([{"": fa.OFTParams(torch.ones(1, 6))}, leaf(2)], "this is OFTParams"),
    ):
        with pytest.raises(AdapterError, match=words):
            fa.combine(adapters, [1.0, 1.0], "linear")
    with pytest.raises(AdapterError, match="at least one"):
        fa.combine([], [], "linear")
    with pytest.raises(AdapterError, match="2 adapters, 1 methods"):
        fa.combine([leaf(2), leaf(2)], [1.0, 1.0], "linear", methods=[fa.LoRA()])
