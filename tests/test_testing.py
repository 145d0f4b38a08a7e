"""fadapt.testing: the strategies give what they say, and the purity check sees every change."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao_int8 import integers

import fadapt as fa
import fadapt.testing as ft


def seen(fn, *things) -> str:
    with pytest.raises(AssertionError) as caught:
        ft.assert_pure(fn, *things)
    return str(caught.value)


def test_changes_of_tensors_are_seen():
    x = torch.zeros(4, 4)
    view = x[:2]
    assert "bytes" in seen(lambda: view.fill_(1), x)
    assert "bytes" in seen(lambda: x[3].fill_(2), view)  # elsewhere in the same storage
    assert "argument 1['a']" in seen(lambda: x.add_(1), 0, {"a": x, "b": torch.ones(1)})
    assert "requires_grad" in seen(lambda: x.requires_grad_(), x)
    assert "grad" in seen(lambda: x.sum().backward(), x)
    y = torch.ones(2, 3)
    assert "shape" in seen(lambda: y.t_(), y)
    things = [y, y]
    assert "structure" in seen(lambda: things.pop(), things)


def test_changes_of_modules_are_seen():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    x = torch.randn(3, 8)
    assert "num_batches_tracked" in seen(lambda: model(x), model)
    assert ".0._parameters['weight'] changed: bytes" in seen(
        lambda: integers(model[0].weight).zero_(), model
    )
    assert "mode" in seen(model.eval, model)
    assert "hooks" in seen(lambda: model[0].register_forward_hook(print), model)
    assert "momentum" in seen(lambda: setattr(model[1], "momentum", 0.5), model)
    assert "class" in seen(lambda: setattr(model, "0", nn.Linear(8, 8)), model)
    assert "bytes" in seen(lambda: setattr(model[0], "bias", nn.Parameter(torch.ones(8))), model)


def test_changes_of_global_state_are_seen():
    assert "random state" in seen(lambda: torch.rand(1))
    try:
        assert "default dtype" in seen(lambda: torch.set_default_dtype(torch.float64))
        assert "gradient mode" in seen(lambda: torch.set_grad_enabled(False))
        log = logging.getLogger("fadapt.tests.somebody")
        assert "fadapt.tests.somebody" in seen(lambda: log.setLevel(logging.ERROR))
        assert "logger root" in seen(lambda: logging.root.addHandler(logging.NullHandler()))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        logging.root.removeHandler(logging.root.handlers[-1])


def test_what_changes_nothing_passes_and_returns_its_value():
    model = nn.Linear(3, 3)
    g = torch.Generator().manual_seed(0)
    fn = lambda: model(torch.ones(2, 3)) + torch.rand(1, generator=g)  # noqa: E731
    assert ft.assert_pure(fn, model).shape == (2, 3)


@given(data=st.data(), model=ft.models(ft.dtypes()))
@settings(max_examples=60, deadline=None)
def test_models_methods_and_adapters_fit_together(data, model):
    method = data.draw(ft.methods(model))
    params = data.draw(ft.adapters(model, method))
    x = data.draw(ft.inputs(model))
    forward = fa.bind(model, method)
    assert params.keys() == forward.layers.keys()
    y = ft.assert_pure(lambda: forward(params, x), model, forward, params, x)
    assert y.shape == (*x.shape[:-1], model.out_features)
    fresh = data.draw(ft.adapters(model, method, fresh=True))
    if getattr(method, "init", "") != "orthogonal":  # whose B A is 0 only up to rounding
        assert torch.equal(forward(fresh, x), forward(None, x))
    with torch.no_grad():
        assert torch.equal(forward(None, x), model(x))
    assert fa.count(params) == sum(leaf.numel() for leaf in tree_leaves(params))


@given(data=st.data(), layer=ft.linears(dtype=ft.dtypes(torch.float64)))
@settings(max_examples=30, deadline=None)
def test_a_layer_is_a_model_too(data, layer):
    method = data.draw(ft.methods(layer, [fa.LoRA]))
    params = data.draw(ft.adapters(layer, method))
    assert list(params) == [""]
    x = data.draw(ft.inputs(layer))
    p = params[""]
    want = layer(x) + method.scaling * (x @ p.lora_A.mT @ p.lora_B.mT + getattr(p, "lora_bias", 0))
    # float64 sums of at most 8 products of numbers of about 1.
    torch.testing.assert_close(fa.bind(layer, method)(params, x), want, rtol=1e-12, atol=1e-12)
