"""torch.func over whole transformers models, beside loops by plain autograd and beside PEFT."""

import copy

import pytest
import torch
from cases import randomized
from hf import (
    CASES,
    GRADIENT,
    SMALL,
    VALUE,
    K,
    case,
    close,
    hidden,
    llama,
    plain_grad,
    seeded,
    stacked,
)
from peft import PeftModel
from torch.autograd.functional import hessian as plain_hessian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import fadapt as fa
from fadapt.testing import assert_pure

pytestmark = [
    # torch on a CPU: sdpa's flash kernel has no batching rule, and runs in a loop under vmap.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # PEFT on a model quantized by plain quantize_: it could not merge. Nothing is merged here.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
    # transformers' new name for it; the old one works in all versions that we allow.
    pytest.mark.filterwarnings("ignore:`(is_|)gradient_checkpointing(_enable|)` is deprecated"),
]


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


both_kinds = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def each(c, ids=None):
    """The K pairs of an adapter and its input."""
    return [(c.adapters[k], c.idss[k] if ids is None else ids) for k in range(K)]


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_the_model(name):
    c = case(name)
    with torch.no_grad():
        want = c.model(c.ids)
        got = assert_pure(lambda: c.forward(None, c.ids), c.model, c.forward)
        assert type(got) is type(want)
        assert torch.equal(hidden(got), hidden(want))
        mask = torch.ones_like(c.ids)
        mask[0, :2] = 0
        want = c.model(input_ids=c.ids, attention_mask=mask, return_dict=False)
        got = c.forward(None, input_ids=c.ids, attention_mask=mask, return_dict=False)
        assert isinstance(got, tuple)
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_peft_s(name, tmp_path):
    c = case(name)
    params = c.adapters[0]
    fa.save_peft(tmp_path, params, c.method, c.model)
    model = PeftModel.from_pretrained(copy.deepcopy(c.model), tmp_path, is_trainable=True).eval()
    want = hidden(model(c.ids))
    close(c.out(params, c.ids), want, VALUE)
    want.sin().mean().backward()
    grads = dict(model.named_parameters())
    for path, leaf in grad(c.loss)(params, c.ids).items():
        for field, got in leaf._asdict().items():
            theirs = grads[f"base_model.model.{path}.{field}.default.weight"].grad
            close(got, theirs, GRADIENT)


@both_kinds
@pytest.mark.parametrize("name", SMALL)
def test_vmap(name, attention):
    c = case(name, attention)
    with torch.no_grad():
        shared = stacked([c.out(p, x) for p, x in each(c, c.ids)])
        close(vmap(c.out, in_dims=(0, None))(c.many, c.ids), shared, VALUE)
        one = stacked([c.out(c.adapters[1], x) for _, x in each(c)])
        close(vmap(c.out, in_dims=(None, 0))(c.adapters[1], c.idss), one, VALUE)
        pairs = stacked([c.out(p, x) for p, x in each(c)])
        close(vmap(c.out)(c.many, c.idss), pairs, VALUE)
        # Masks that differ from adapter to adapter: additive, [batch, 1, queries, keys].
        seen = torch.rand(K, 2, 1, 5, 5, generator=seeded()) < 0.7
        seen |= torch.eye(5, dtype=torch.bool)
        masks = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        masked = [c.out(p, x, attention_mask=m) for (p, x), m in zip(each(c), masks, strict=True)]
        got = vmap(lambda p, x, m: c.out(p, x, attention_mask=m))(c.many, c.idss, masks)
        close(got, stacked(masked), VALUE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_vmap_returns_the_model_s_own_output_class(name):
    c = case(name)
    run = lambda p, x: c.forward(p, x, use_cache=False, output_hidden_states=True)  # noqa: E731
    with torch.no_grad():
        got = vmap(run, in_dims=(0, None))(c.many, c.ids)
        want = [run(p, x) for p, x in each(c, c.ids)]
    assert type(got) is type(want[0])
    assert got.keys() == want[0].keys()
    close(hidden(got), stacked([hidden(w) for w in want]), VALUE)
    close(got.hidden_states, stacked([w.hidden_states for w in want]), VALUE)


def test_vmap_over_a_model_with_dropout_of_its_own():
    c = case("bert")
    forward = fa.bind(copy.deepcopy(c.model).train(), c.method)
    run = lambda p: hidden(forward(p, c.ids))  # noqa: E731
    twice = fa.stack([c.adapters[0], c.adapters[0]])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = vmap(run, randomness="different")(twice)
        assert not torch.allclose(first, second)
        first, second = vmap(run, randomness="same")(twice)
        close(first, second, VALUE)
        first, second = vmap(lambda p: c.out(p, c.ids))(twice)  # bound in evaluation mode
        close(first, c.out(c.adapters[0], c.ids), VALUE)


@both_kinds
@pytest.mark.parametrize("name", SMALL)
def test_gradients(name, attention):
    c = case(name, attention)
    want = [plain_grad(lambda p, x=x: c.loss(p, x), p) for p, x in each(c)]
    close(grad(c.loss)(c.adapters[0], c.ids), want[0], GRADIENT)
    close(vmap(grad(c.loss))(c.many, c.idss), stacked(want), GRADIENT)
    close(grad(lambda m: vmap(c.loss)(m, c.idss).sum())(c.many), stacked(want), GRADIENT)
    _, grads = fa.value_and_grad(c.loss, in_dims=(0, 0))(c.many, c.idss)
    close(grads, stacked(want), GRADIENT)


def test_gradients_of_the_model_s_own_loss():
    c = case("llama", "sdpa")
    loss = lambda p, x: c.forward(p, x, labels=x).loss  # noqa: E731
    want = stacked([plain_grad(lambda p, x=x: loss(p, x), p) for p, x in each(c)])
    close(vmap(grad(loss))(c.many, c.idss), want, GRADIENT)


@pytest.mark.parametrize("name", ["minilm", "minilm-int8"])
def test_pretrained(name):
    c = case(name)
    with torch.no_grad():
        want = stacked([c.out(p, x) for p, x in each(c, c.ids)])
        close(vmap(c.out, in_dims=(0, None))(c.many, c.ids), want, VALUE)
    want = stacked([plain_grad(lambda p, x=x: c.loss(p, x), p) for p, x in each(c)])
    close(vmap(grad(c.loss))(c.many, c.idss), want, GRADIENT)


@pytest.mark.parametrize("name", SMALL)
def test_forward_mode_and_jacobians(name):
    c = case(name)
    p, tangent = c.adapters[0], c.adapters[1]
    slope = jvp(lambda p: c.loss(p, c.ids), (p,), (tangent,))[1]
    terms = [
        (g * t).flatten()
        for g, t in zip(tree_leaves(grad(c.loss)(p, c.ids)), tree_leaves(tangent), strict=True)
    ]
    products = torch.cat(terms)
    # The sum of so many products, of both signs: relative to the sum of their sizes.
    assert (slope - products.sum()).abs() <= GRADIENT * products.abs().sum()
    corner = lambda p: c.out(p, c.ids)[0, :2, :2]  # noqa: E731
    back, ahead = jacrev(corner)(p), jacfwd(corner)(p)
    rows = [plain_grad(lambda p, i=i, j=j: corner(p)[i, j], p) for i in range(2) for j in range(2)]
    want = tree_map(lambda t: t.unflatten(0, (2, 2)), stacked(rows))
    close(back, want, GRADIENT)
    close(ahead, want, GRADIENT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_hessian(name):
    c = case(name)
    path = next(iter(c.method.at(list(c.forward.layers))))

    def loss(a):
        first = c.adapters[0][path]._replace(lora_A=a)
        return c.loss({**c.adapters[0], path: first}, c.ids)

    at = c.adapters[0][path].lora_A
    want = plain_hessian(loss, at)
    # Second derivatives: each of them is a sum as long as the first's, over as many more layers.
    close(hessian(loss)(at), want, 2 * GRADIENT)
    close(jacrev(jacrev(loss))(at), want, 2 * GRADIENT)


def test_forward_mode_through_sdpa_by_its_math_backend():
    c, eager = case("llama", "sdpa"), case("llama")
    with sdpa_kernel(SDPBackend.MATH):
        got = jvp(lambda p: c.out(p, c.ids), (c.adapters[0],), (c.adapters[1],))[1]
    want = jvp(lambda p: eager.out(p, c.ids), (c.adapters[0],), (c.adapters[1],))[1]
    close(got, want, GRADIENT)


def test_compiled_over_int8():
    c = case("llama-int8")
    run = lambda p, x: c.out(p, x, use_cache=False)  # noqa: E731
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(c.adapters[0], c.ids)
    close(got, run(c.adapters[0], c.ids), VALUE)
    step = vmap(grad(lambda p, x: c.loss(p, x, use_cache=False)))
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(c.many, c.idss)
    close(got, step(c.many, c.idss), GRADIENT)


def one_block():
    model = llama(num_hidden_layers=1, attn_implementation="eager")
    method = fa.LoRA(rank=2, targets=["q_proj", "down_proj"])
    forward = fa.bind(model, method)
    fresh = fa.init(method, model, generator=seeded())
    adapters = [randomized(fresh, seed) for seed in range(K)]
    run = lambda p, x: forward(p, x, use_cache=False).logits  # noqa: E731
    return run, lambda p, x: run(p, x).sin().mean(), adapters, case("llama").idss


def test_compiled_by_inductor():
    run, loss, adapters, idss = one_block()
    close(
        torch.compile(run, fullgraph=True)(adapters[0], idss[0]), run(adapters[0], idss[0]), VALUE
    )
    step, many = vmap(grad(loss)), fa.stack(adapters)
    close(torch.compile(step, fullgraph=True)(many, idss), step(many, idss), GRADIENT)


def corner(run):
    return lambda p, x: run(p, x)[0, :2, :2]


@pytest.mark.parametrize(
    "transform",
    [
        lambda run, loss: lambda p, q, x: vmap(run)(fa.stack([p, q]), x[:2]),
        lambda run, loss: (
            lambda p, q, x: grad(lambda m: vmap(loss)(m, x[:2]).sum())(fa.stack([p, q]))
        ),
        lambda run, loss: lambda p, q, x: jvp(lambda p: run(p, x[0]), (p,), (q,))[1],
        lambda run, loss: lambda p, q, x: jacrev(corner(run))(p, x[0]),
        lambda run, loss: lambda p, q, x: jacfwd(corner(run))(p, x[0]),
        lambda run, loss: (
            lambda p, q, x: grad(
                lambda p: sum(t.square().sum() for t in grad(loss)(p, x[0]).values() for t in t)
            )(p)
        ),
    ],
    ids=["vmap", "grad_of_vmap", "jvp", "jacrev", "jacfwd", "grad_of_grad"],
)
def test_every_transform_compiled(transform):
    run, loss, (p, q, _), idss = one_block()
    call = transform(run, loss)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(p, q, idss)
    close(got, call(p, q, idss), GRADIENT)
