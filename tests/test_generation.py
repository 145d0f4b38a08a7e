"""Generation: each prompt gets the tokens that it gets alone, whatever else is in the batch."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_map
from transformers import T5Config, T5ForConditionalGeneration

import fadapt as fa
from fadapt.models import SHIPPED, load_model, load_tokenizer
from fadapt.random import hashed_uniform
from fadapt.testing import assert_pure

# Prompts, each with the adapter that it wears.
PROMPTS = [
    ("a0", "import"),
    ("base", "def read(self, path):"),
    ("a1", "<p>The"),
    ("a2", "once upon a time"),
    ("a0", "for name in"),
    ("base", "x"),
    ("a2", "class A:\n    def __init__(self):"),
    ("a1", "if not"),
]
NEW = 6


def randomized(params, seed):
    g = torch.Generator().manual_seed(seed)
    # Small enough to stay a language model, large enough to say something else.
    return tree_map(lambda t: 0.6 * t + 0.12 * torch.randn(t.shape, generator=g), params)


@cache
def make(base="dense"):
    model = load_model(SHIPPED / "model", base, "float32")
    tokenizer = load_tokenizer(SHIPPED / "model")
    methods = [
        fa.LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"]),
        fa.LoRA(rank=2, targets=["up_proj", "down_proj"]),
        fa.OFT(block_size=16, targets=["o_proj"]),
    ]
    g = torch.Generator().manual_seed(0)
    rooms = [fa.LoRA(rank=4, targets=["q_proj", "v_proj", "up_proj", "down_proj"]), methods[2]]
    bank = fa.Bank.of(model, rooms, capacity=2)
    adapters = {}
    for k, method in enumerate(methods):
        adapters[f"a{k}"] = (randomized(fa.init(method, model, generator=g), k), method)
        bank = bank.add(f"a{k}", *adapters[f"a{k}"])
    return model, tokenizer, bank, fa.bind_mixed(model, bank.method), adapters


def encode(tokenizer, texts):
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def run(case, prompts, **options):
    _, tokenizer, bank, mixed, _ = case
    given = encode(tokenizer, [text for _, text in prompts])
    out = fa.generate(mixed, bank, [n for n, _ in prompts], **given, max_new_tokens=NEW, **options)
    return out[:, given["input_ids"].shape[1] :]


def equal(got, want):
    """Up to the padding after an end, of which a shorter batch has less."""
    size = max(got.shape[-1], want.shape[-1])
    pad = [torch.nn.functional.pad(t, (0, size - t.shape[-1])) for t in (got, want)]
    return torch.equal(*pad)


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_greedy_tokens_are_those_of_each_prompt_alone(base):
    case = make(base)
    together = run(case, PROMPTS)
    alone = [run(case, [p])[0] for p in PROMPTS]
    assert all(equal(a, b) for a, b in zip(together, alone, strict=True))
    bare = run(case, [("base", text) for _, text in PROMPTS])
    differ = [not equal(a, b) for a, b in zip(together, bare, strict=True)]
    assert sum(differ) >= 4  # of the six that wear an adapter
    assert not differ[1]
    assert not differ[5]


def test_greedy_tokens_are_those_of_the_adapted_model_itself():
    model, tokenizer, *_, adapters = case = make()
    for name, text in PROMPTS[2:4]:
        given = encode(tokenizer, [text])
        worn = model if name == "base" else merged(model, *adapters[name])
        want = worn.generate(**given, max_new_tokens=NEW, do_sample=False)
        assert equal(run(case, [(name, text)])[0], want[0, given["input_ids"].shape[1] :])


def merged(model, params, method):
    worn = fa.bind(model, method)
    tensors = {
        f"{path}.{name}": tensor
        for path, leaf in worn.prepare(params).items()
        for name, tensor in leaf._asdict().items()
    }
    for name, tensor in tensors.items():
        path, _, field = name.rpartition(".")
        setattr(worn.shell.get_submodule(path), field, tensor)
    return worn.shell


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_sampled_tokens_are_those_of_each_prompt_alone_for_each_seed(base):
    case = make(base)
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95}
    before = torch.get_rng_state()
    seen = set()
    for seed in range(2):
        seeds = [seed + 10 * i for i in range(len(PROMPTS))]
        together = run(case, PROMPTS, seed=seeds, **options)
        for i, prompt in enumerate(PROMPTS):
            assert equal(together[i], run(case, [prompt], seed=seeds[i], **options)[0])
        seen.add(tuple(together.flatten().tolist()))
    assert len(seen) == 2
    assert torch.equal(torch.get_rng_state(), before)
    drawn = torch.Generator().manual_seed(0)
    first = run(case, PROMPTS, seed=drawn, **options)
    assert not torch.equal(first, run(case, PROMPTS, seed=drawn, **options))


def test_several_samples_of_a_prompt_differ():
    out = run(make(), PROMPTS[:2], do_sample=True, num_return_sequences=3, seed=1)
    assert out.shape[0] == 6
    assert len({tuple(row.tolist()) for row in out[:3]}) == 3


def test_what_is_sampled_follows_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    seeds = torch.arange(40_000)
    noise = -torch.log(-torch.log(hashed_uniform(seeds, 3, 5)))
    counts = torch.bincount((logits + noise).argmax(-1), minlength=5).double()
    want = logits.double().softmax(-1) * len(seeds)
    # chi-square of 4 degrees of freedom: above 18.5 once in a thousand; the seeds are fixed
    assert ((counts - want) ** 2 / want).sum() < 18.5


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_beams_keep_their_adapters(base):
    model, tokenizer, _, _, adapters = make(base)
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    seen = set()
    for seed in range(2):
        other = {n: (randomized(params, seed), m) for n, (params, m) in adapters.items()}
        bank = fa.Bank.holding(model, other)
        case = model, tokenizer, bank, fa.bind_mixed(model, bank.method), other
        together = run(case, PROMPTS, **options)
        for i, prompt in enumerate(PROMPTS):
            alone = run(case, [prompt], **options)
            assert equal(together[2 * i : 2 * i + 2], alone)
        seen.add(tuple(together.flatten().tolist()))
    assert len(seen) == 2


def test_nothing_is_changed_and_no_cache_gives_the_same():
    model, tokenizer, bank, _, _ = case = make()
    given = encode(tokenizer, [text for _, text in PROMPTS[:3]])
    names = [name for name, _ in PROMPTS[:3]]
    out = assert_pure(
        lambda: fa.generate(model, bank, names, **given, max_new_tokens=4, use_cache=False),
        model,
        bank.params,
        given,
    )
    assert torch.equal(out[:, -4:], run(case, PROMPTS[:3])[:, :4])


@pytest.mark.parametrize(
    ("options", "name", "match"),
    [
        ({"names": ["a7", "a0"]}, "AdapterError", "no adapter 'a7'"),
        ({"names": "a0"}, "AdapterError", "expected a list of names"),
        ({"names": ["a0"]}, "AdapterError", "holds 2 prompts, and 1 adapters"),
        ({"names": [], "input_ids": torch.zeros(0, 2).long()}, "AdapterError", "no prompts"),
        ({"do_sample": True}, "ConfigError", "pass seed="),
        ({"seed": 3}, "ConfigError", "nothing is sampled"),
        ({"do_sample": True, "seed": [1]}, "ConfigError", "1 seeds for 2 prompts"),
        ({"do_sample": True, "seed": 1, "num_beams": 2}, "ConfigError", "sample without beams"),
    ],
)
def test_errors(options, name, match):
    _, tokenizer, bank, mixed, _ = make()
    given = encode(tokenizer, ["a", "b"])
    names = ["a0", "base"]
    with pytest.raises(getattr(fa.errors, name), match=match):
        fa.generate(mixed, bank, **{"names": names, **given, "max_new_tokens": 2, **options})


def test_a_forward_that_is_not_the_banks_is_refused():
    model, tokenizer, bank, _, _ = make()
    given = encode(tokenizer, ["a"])
    # Of the same shapes, but it would scale what the bank has scaled already.
    scaled = replace(bank.method.methods[0], alpha=8)
    for method in (scaled, replace(bank.method, methods=(scaled, *bank.method.methods[1:]))):
        with pytest.raises(fa.errors.AdapterError, match="with another method than the bank's"):
            fa.generate(fa.bind_mixed(model, method), bank, ["a0"], **given, max_new_tokens=1)
    with pytest.raises(fa.errors.AdapterError, match="Linear has no generate"):
        fa.generate(torch.nn.Linear(2, 2), bank, ["a0"], **given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
)
def test_an_encoder_sees_each_prompt_once_and_its_decoder_every_beam(options):
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=3.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).eval()
    methods = [fa.LoRA(rank=2, targets=["q", "wi"]), fa.LoRA(rank=3, targets=["v"])]
    fresh = [fa.init(m, model, generator=torch.Generator().manual_seed(0)) for m in methods]
    adapters = [tree_map(lambda t: 5 * t, randomized(p, k)) for k, p in enumerate(fresh)]
    given = {f"a{k}": pair for k, pair in enumerate(zip(adapters, methods, strict=True))}
    bank = fa.Bank.holding(model, given)
    rows, names = [[5, 6, 7], [9, 1], [11, 12, 13, 14, 1], [3, 4]], ["a0", "base", "a1", "a0"]
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    seeds = {"seed": [1, 2, 3, 4]} if "do_sample" in options else {}
    out = fa.generate(model, bank, names, **inputs, max_new_tokens=5, **options, **seeds)
    each = len(out) // 4
    for i, row in enumerate(rows):
        one = {k: t[i : i + 1, : len(row)] for k, t in inputs.items()}
        seed = {"seed": [i + 1]} if seeds else {}
        alone = fa.generate(model, bank, [names[i]], **one, max_new_tokens=5, **options, **seed)
        assert equal(out[each * i : each * (i + 1)], alone)
        if names[i] != "base" and not seeds:
            worn = fa.merged_model(model, *given[names[i]])
            want = worn.generate(**one, max_new_tokens=5, do_sample=False, **options)
            assert equal(alone, want)
    bare = fa.generate(model, bank, ["base"] * 4, **inputs, max_new_tokens=5, **options, **seeds)
    assert not equal(bare, out)
    assert equal(bare[each : 2 * each], out[each : 2 * each])
    if each > 1:
        with pytest.raises(fa.errors.ConfigError, match="pass attention_mask="):
            fa.generate(model, bank, names, input_ids=ids, max_new_tokens=5, **options, **seeds)
