"""Training through transformers models: checkpointed blocks, optimizers, caches, tied weights."""

import copy
from dataclasses import replace

import pytest
import torch
import torchopt
from cases import randomized
from hf import GRADIENT, SMALL, VALUE, K, case, close, gpt2, hidden, plain_grad, seeded
from peft import PeftModel
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import fadapt as fa
from fadapt.errors import AdapterError, ConfigError
from fadapt.testing import assert_pure

pytestmark = [
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),  # see test_peft.py
    # transformers' older name, which all the versions have that we allow.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpointed_call(name):
    c = case(name)
    p = c.adapters[0]
    run = lambda p: checkpoint(c.loss, p, c.ids, use_reentrant=False)  # noqa: E731
    # The same operations on the same numbers, twice: the same bytes.
    close(fa.value_and_grad(run)(p), fa.value_and_grad(c.loss)(p, c.ids), 0)


def training(name, **options):
    """A model in training mode whose own dropout is off, and a forward with dropout of ours."""
    c = case(name)
    model = copy.deepcopy(c.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    method = fa.LoRA(rank=2, alpha=3, targets=c.method.targets, dropout=0.5)
    return c, model, method


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_checkpointed_blocks(name, reentrant):
    c, model, method = training(name)
    plain = fa.bind(model, method)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    forward = fa.bind(model, method)
    seed, calls = torch.tensor(5), []
    forward.layers[next(iter(forward.layers))].register_forward_hook(lambda *_: calls.append(1))

    def loss(forward):
        return lambda p: hidden(forward(p, c.ids, dropout=seed)).sin().mean()

    got = assert_pure(lambda: fa.value_and_grad(loss(forward))(c.adapters[0]), model, forward)
    close(got, fa.value_and_grad(loss(plain))(c.adapters[0]), 0)
    assert len(calls) == 2  # computed again in backward
    with torch.no_grad():
        assert torch.equal(loss(forward)(c.adapters[0]), got[0])
    # By .backward(), as torch.optim has it.
    leaves = tree_map(lambda t: t.clone().requires_grad_(), c.adapters[0])
    loss(forward)(leaves).backward()
    close(tree_map(lambda t: t.grad, leaves), got[1], 0)


def test_checkpointed_blocks_inside_a_transform_are_refused():
    c, model, method = training("llama")
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()
    forward = fa.bind(model, method)
    loss = lambda p, x: forward(p, x).logits.sin().mean()  # noqa: E731
    for step in (vmap(grad(loss)), fa.value_and_grad(loss, in_dims=(0, 0))):
        with pytest.raises(ConfigError, match="gradient_checkpointing_disable"):
            step(c.many, c.idss)
    with torch.no_grad():
        assert vmap(loss)(c.many, c.idss).shape == (K,)
    # In eval mode transformers checkpoints nothing.
    forward = fa.bind(model.eval(), method)
    want = [
        plain_grad(lambda p, x=x: c.loss(p, x), p) for p, x in zip(c.adapters, c.idss, strict=True)
    ]
    close(vmap(grad(loss))(c.many, c.idss), fa.stack(want), GRADIENT)


@pytest.mark.parametrize("name", ["llama", "llama-int8"])
def test_torch_optim_takes_the_steps_that_it_takes_for_peft(name, tmp_path):
    c = case(name)
    fa.save_peft(tmp_path, c.adapters[0], c.method, c.model)
    model = PeftModel.from_pretrained(copy.deepcopy(c.model), tmp_path, is_trainable=True).eval()
    theirs = [p for p in model.parameters() if p.requires_grad]
    params = tree_map(lambda t: t.clone().requires_grad_(), c.adapters[0])
    ours = tree_leaves(params)
    losses = []
    for parameters, run in (
        (ours, lambda x: c.forward(params, x, labels=x)),
        (theirs, lambda x: model(x, labels=x)),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for k in range(4):
            loss = run(c.idss[k % K], labels=c.idss[k % K]).loss if False else None
            logits = hidden(run(c.idss[k % K]))
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), c.idss[k % K][:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert losses[3] < losses[0]
    # Adam divides a gradient by its size: small gradients carry their rounding into whole steps.
    # Four of them keep the losses within a thousandth of a step's effect.
    close(torch.stack(losses[:4]), torch.stack(losses[4:]), 1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-int8"])
def test_torchopt_takes_torch_optim_s_steps_one_by_one_and_stacked(name):
    c = case(name)
    optimizer = torchopt.adam(lr=1e-2)

    def train(params, ids):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(grad(c.loss)(params, ids), state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params

    got = assert_pure(lambda: train(c.adapters[0], c.ids), c.model, c.adapters[0])
    want = tree_map(lambda t: t.clone().requires_grad_(), c.adapters[0])
    adam = torch.optim.Adam(tree_leaves(want), lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        c.loss(want, c.ids).backward()
        adam.step()
    close(got, tree_map(lambda t: t.detach(), want), 1e-4)

    # K at once: each as if alone.
    alone = [train(p, x) for p, x in zip(c.adapters, c.idss, strict=True)]
    state = optimizer.init(c.many)
    many = c.many
    for _ in range(3):
        grads = vmap(grad(c.loss))(many, c.idss)
        updates, state = optimizer.update(grads, state, inplace=False)
        many = torchopt.apply_updates(many, updates, inplace=False)
    close(many, fa.stack(alone), 1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-int8", "gpt2"])
def test_a_cache_continues_a_sequence(name, tmp_path):
    c = case(name, "sdpa")
    p, ids = c.adapters[0], c.idss[0]
    fa.save_peft(tmp_path, p, c.method, c.model)
    model = PeftModel.from_pretrained(copy.deepcopy(c.model), tmp_path).eval()
    want = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    with torch.no_grad():
        whole = c.out(p, want)
        cache, new, tokens = DynamicCache(), ids, ids
        for _ in range(want.shape[1] - ids.shape[1]):
            output = c.forward(p, new, past_key_values=cache, use_cache=True)
            at = tokens.shape[1] - 1
            close(output.logits[:, -1], whole[:, at], VALUE)
            new = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
        assert torch.equal(tokens, want)


@pytest.mark.parametrize("saved", ["wte", "lm_head"])
def test_tied_weights_part_where_one_is_trained_whole(saved):
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    method = fa.LoRA(rank=2, targets=["c_attn"], modules_to_save=[saved])
    params = randomized(fa.init(method, model, generator=seeded()), 0)
    ids = case("gpt2").ids
    forward = fa.bind(model, method)
    got = assert_pure(lambda: forward(params, ids).logits.detach(), model)
    (path,) = (p for p in params if p.endswith(saved))
    parted = copy.deepcopy(model)
    parted.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    parted.get_submodule(path).weight.data = params[path]["weight"]
    rest = {p: leaf for p, leaf in params.items() if p != path}
    plain = fa.bind(parted, fa.LoRA(rank=2, targets=["c_attn"]))
    assert torch.equal(got, plain(rest, ids).logits.detach())
    grads = grad(lambda p: forward(p, ids).logits.sin().mean())(params)
    used = grads[path]["weight"].abs().sum(1) > 0
    assert used.sum() == (64 if saved == "lm_head" else ids.unique().numel())


@pytest.mark.parametrize("name", ["llama", "bert-int8"])
def test_checkpointed_blocks_of_a_mixed_batch(name):
    c, model, method = training(name)
    method = replace(method, dropout=0.0)
    plain = fa.bind_mixed(model, method)
    model.activation_checkpointing_enable()
    mixed = fa.bind_mixed(model, method)
    ids = torch.tensor([2, 0])

    def loss(mixed):
        return lambda bank: hidden(mixed(bank, ids, c.ids)).sin().mean()

    close(fa.value_and_grad(loss(mixed))(c.many), fa.value_and_grad(loss(plain))(c.many), 0)


class Checkpointing(torch.nn.Module):
    """A model that calls torch.utils.checkpoint itself."""

    def __init__(self, reentrant):
        super().__init__()
        self.up, self.down, self.reentrant = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4), reentrant

    def forward(self, x):
        return checkpoint(self.down, self.up(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_a_model_of_one_s_own_is_refused_in_backward(reentrant):
    # There the part is called again without its adapter: the reentrant kind's gradients would be
    # those of the base, in silence.
    model, method = Checkpointing(reentrant), fa.LoRA(rank=2)
    params = randomized(fa.init(method, model, generator=seeded()), 0)
    leaves = tree_map(lambda t: t.requires_grad_(), params)
    loss = fa.bind(model, method)(leaves, torch.ones(3, 4)).sum()
    with pytest.raises(AdapterError, match="Checkpoint the whole forward"):
        loss.backward()


@pytest.mark.parametrize("kind", ["composed", "mixed", "bias", "saved"])
def test_nor_does_it_pass_in_silence_elsewhere(kind):
    model, method = Checkpointing(kind in ("composed", "mixed")), fa.LoRA(rank=2)
    if kind in ("bias", "saved"):  # of what the checkpoint calls, no layer is adapted
        model.down = torch.nn.Sequential(model.down, torch.nn.Tanh())
        extra = {"bias": "all"} if kind == "bias" else {"modules_to_save": ["down.0"]}
        method = fa.LoRA(rank=2, targets=["up"], **extra)
    params = randomized(fa.init(method, model, generator=seeded()), 0)
    leaves, x = tree_map(lambda t: t.requires_grad_(), params), torch.ones(3, 4)
    if kind == "composed":
        loss = fa.bind(model, [method, method])([leaves, leaves], x).sum()
    elif kind == "mixed":
        loss = fa.bind_mixed(model, method)(fa.stack([leaves, leaves]), [0, 1, -1], x).sum()
    else:
        loss = fa.bind(model, method)(leaves, x).sum()
    with pytest.raises(AdapterError, match="Checkpoint the whole forward"):
        loss.backward()
