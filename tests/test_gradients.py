"""value_and_grad: torch.func's own result, by plain autograd."""

import pytest
import torch
from torch import nn
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import fadapt as fa
from fadapt.errors import AdapterError
from fadapt.testing import assert_pure


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    method = fa.LoRA(rank=2)
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params = {p: leaf._replace(lora_B=leaf.lora_B + 0.1) for p, leaf in params.items()}
    return fa.bind(model, method), params, torch.randn(4, 5, dtype=torch.float64)


def test_equals_torch_func_alone_and_under_vmap():
    forward, params, x = case()

    def loss(p, x):
        return forward(p, x).square().mean()

    value, grads = fa.value_and_grad(loss)(params, x)
    want, value_ = grad_and_value(loss)(params, x)
    assert torch.equal(value, value_)
    torch.testing.assert_close(grads, want, rtol=1e-12, atol=1e-14)  # float64, another order
    assert not value.requires_grad
    assert not grads["0"].lora_A.requires_grad
    many = fa.stack([params, params])
    mapped = vmap(fa.value_and_grad(loss), in_dims=(0, None))
    inside = vmap(fa.value_and_grad(loss, in_dims=(0, None)), in_dims=(None, 0))
    for step in (mapped, fa.value_and_grad(loss, in_dims=(0, None))):
        values, grads = step(many, x)
        torch.testing.assert_close(values, torch.stack([value, value]))
        torch.testing.assert_close(fa.unstack(grads)[1], want)
    values, grads = inside(many, x[None])
    torch.testing.assert_close(values, value.expand(1, 2))
    torch.testing.assert_close(fa.unstack(fa.unstack(grads)[0])[1], want)


@pytest.mark.parametrize("method", [fa.OFT(block_size=2), fa.DoRA(rank=2), fa.LoRA(rank=2)])
def test_vjp_is_torch_func_s_alone_and_under_vmap(method):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    forward = fa.bind(model, method)
    g = torch.Generator().manual_seed(0)
    fresh = fa.init(method, model, generator=g)
    params = tree_map(lambda t: t + 0.1 * torch.randn(t.shape, generator=g, dtype=t.dtype), fresh)
    value, back = assert_pure(lambda: fa.vjp(forward.prepare, params), params)
    wanted, pull = torch.func.vjp(forward.prepare, params)
    grads = tree_map(torch.cos, wanted)
    for got, want in ((value, wanted), (back(grads), pull(grads)[0]), (back(grads), back(grads))):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert not any(leaf.requires_grad for leaf in tree_leaves(got))
    many = fa.stack([params, params])
    mapped = vmap(lambda p, g: fa.vjp(forward.prepare, p)[1](g), (0, None))(many, grads)
    torch.testing.assert_close(fa.unstack(mapped)[1], back(grads), rtol=1e-12, atol=1e-14)


def test_vjp_of_what_does_not_depend_on_a_leaf_and_of_a_gradient_that_does_not_fit():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    value, back = fa.vjp(lambda p: (p["a"].sum(), torch.ones(4)), params)
    assert torch.equal(value[1], torch.ones(4))
    grads = back((torch.tensor(2.0), torch.ones(4)))
    assert torch.equal(grads["a"], 2 * torch.ones(2))
    assert torch.equal(grads["b"], torch.zeros(3))
    with pytest.raises(AdapterError, match=r"expected \[\[\], \[4\]\], got \[\[2\], \[4\]\]"):
        back((torch.ones(2), torch.ones(4)))


def test_leaves_without_a_path_to_the_loss_get_zeros_and_inputs_stay_as_they_are():
    _, params, _ = case()
    _, grads = fa.value_and_grad(lambda p: p["0"].lora_A.sum())(params)
    assert grads["2"].lora_B.count_nonzero() == 0
    assert grads["0"].lora_A.eq(1).all()
    assert not any(leaf.requires_grad for leaf in params["0"])


def test_a_loss_of_several_numbers_is_refused_for_many_adapters_too():
    many = {"w": torch.ones(3, 2)}
    step = fa.value_and_grad(lambda p, x: p["w"] * x, in_dims=(0, None))
    with pytest.raises(AdapterError, match=r"one number; got \[2\]"):
        step(many, torch.ones(2))


def test_checkpoint_inside():
    forward, params, x = case()
    plain = fa.value_and_grad(lambda p: forward(p, x).square().mean())(params)
    again = fa.value_and_grad(
        lambda p: checkpoint(forward, p, x, use_reentrant=False).square().mean()
    )(params)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)
