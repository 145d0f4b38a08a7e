"""``fadapt generate``: every prompt of the file gets the tokens that it gets alone."""

import json
import re
import subprocess
import sys

import peft
import pytest
import torch
from small_lm import make_adapters
from transformers import AutoTokenizer, LlamaForCausalLM

import fadapt as fa
from fadapt import cli, generate_prompts

# PEFT asks transformers for a name that the next one drops.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
METHODS = {
    "small": fa.LoRA(rank=2, alpha=8, targets=["q_proj", "v_proj"]),
    "ragged": fa.LoRA(rank=3, alpha=5, rslora=True, targets=["up_proj", "q_proj"],
                      rank_pattern={"up_proj": 5}),
    "dora": fa.DoRA(rank=2, alpha=3, targets=["o_proj", "down_proj"]),
    "oft": fa.OFT(block_size=4, targets=["v_proj"]),
    "oft8": fa.OFT(block_size=8, targets=["o_proj"]),
}  # fmt: skip
PROMPTS = [
    ("small", "import"),
    ("base", "def read(self, path):"),
    ("oft", "<p>The"),
    ("ragged", "once upon a time"),
    ("dora", "for name in"),
    ("oft8", "x\ty"),
    ("small", "class A:\n    def __init__(self):"),
    ("ragged", "if not"),
]
NEW = 7


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The words that name the model, the adapters and the prompts; and the folder of all."""
    root = tmp_path_factory.mktemp("generate")
    words = ["generate", *make_adapters(root, METHODS)]
    lines = [json.dumps({"adapter": a, "prompt": p}) for a, p in PROMPTS]
    (root / "prompts.jsonl").write_text("\n\n".join(lines) + "\n")
    return [*words, "--prompts", str(root / "prompts.jsonl"), "--max-new-tokens", str(NEW)], root


def lines_of(capsys, *words):
    assert cli.main(words) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_greedy_tokens_are_those_of_peft_one_by_one(given, capsys):
    words, root = given
    lines = lines_of(capsys, *words, "--batch-size", "3")
    assert [(line["adapter"], line["prompt"]) for line in lines] == PROMPTS
    assert [line["index"] for line in lines] == list(range(len(PROMPTS)))
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    bare = 0
    for line in lines:
        model = LlamaForCausalLM.from_pretrained(root / "model").eval()
        inputs = tokenizer(line["prompt"], return_tensors="pt")
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        options = {"max_new_tokens": NEW, "do_sample": False}
        plain = model.generate(**inputs, **options)
        if line["adapter"] != "base":
            model = peft.PeftModel.from_pretrained(model, root / line["adapter"])
        want = model.generate(**inputs, **options)
        tokens = want[0, inputs["input_ids"].shape[1] :].tolist()
        ended = 0 in tokens
        assert line["finish_reason"] == ("stop" if ended else "length")
        assert line["tokens"] == (tokens[: tokens.index(0)] if ended else tokens)
        assert line["text"] == tokenizer.decode(line["tokens"])
        bare += torch.equal(plain, want)
    assert bare < 3  # the base's prompt, and a few that its adapter leaves alone


@pytest.mark.parametrize("base", ["dense", "int8"])
@pytest.mark.parametrize(
    "more",
    [
        "",
        "--do-sample --temperature 0.9 --top-k 50 --top-p 0.9 --num-return-sequences 2 --seed 3",
        "--num-beams 3 --num-return-sequences 2 --length-penalty 0",
    ],
)
def test_a_prompts_tokens_are_the_same_in_batches_of_any_size(given, capsys, base, more):
    words = [*given[0], "--base", base, *more.split()]
    one, three, all_ = (lines_of(capsys, *words, "--batch-size", size) for size in "138")
    assert one == three == all_
    assert len(one) == len(PROMPTS) * (2 if more else 1)
    assert len({tuple(line["tokens"]) for line in one}) > len(PROMPTS) // 2


def test_samples_follow_the_seed(given, capsys):
    zero, also, other = (
        lines_of(capsys, *given[0], "--do-sample", *seed)
        for seed in ([], ["--seed", "0"], ["--seed", "1"])
    )
    assert zero == also
    assert sum(a["tokens"] != b["tokens"] for a, b in zip(zero, other, strict=True)) > 4


def test_each_batch_is_told_as_it_ends_and_the_rest_goes_to_stderr(
    given, capsys, monkeypatch, tmp_path
):
    out, told = tmp_path / "out", []

    def watched(*args, **kwargs):
        told.append(len(out.read_text().splitlines()))
        return fa.generate(*args, **kwargs)

    monkeypatch.setattr(generate_prompts, "generate", watched)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal, and draws its bar
    with out.open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert cli.main([*given[0], "--batch-size", "3"]) == 0
    assert told == [0, 3, 6]
    assert len(out.read_text().splitlines()) == 8
    err = capsys.readouterr().err
    assert "8/8" in err
    assert "8 prompts, 5 adapters: " in err


def test_the_shipped_model_from_the_shell_and_tabs(tmp_path):
    from fadapt.models import SHIPPED, load_model

    model = load_model(SHIPPED / "model", "dense")
    method = fa.LoRA(rank=2, targets=["q_proj"])
    params = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    fa.save_peft(tmp_path / "a", params, method, model)
    (tmp_path / "p.tsv").write_text("base\timport\na\timport\n\n", "utf-8")
    words = ["--adapter", f"a={tmp_path / 'a'}", "--prompts", str(tmp_path / "p.tsv")]
    command = [sys.executable, "-m", "fadapt", "generate", *words, "--max-new-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base, fresh = (json.loads(line) for line in done.stdout.splitlines())
    assert base["text"] == fresh["text"] != ""  # a fresh adapter changes nothing


@pytest.mark.parametrize(
    ("more", "prompts", "message"),
    [
        ((), '{"adapter": "smal", "prompt": "a"}', "line 1: there is no adapter 'smal'. Near mis"),
        ((), '\n{"adapter": "bas", "prompt": "a"}', "line 2: there is no adapter 'bas'. Near mis"),
        ((), '{"adapter": "small"}', 'expected an object with the strings "adapter" and "prompt"'),
        ((), '{"adapter": "small", "prompt": 3}', "expected an object"),
        ((), '{"adapter": "small", "prompt": "a", "promt": "b"}', "and no more"),
        ((), "[", "line 1: not JSON"),
        ((), "\n", "holds no prompt"),
        ((), '{"adapter": "small", "prompt": ""}', "line 1: the prompt has no token"),
        ((), '{"adapter": "small", "prompt": "%s"}' % ("a b " * 40), "of the 64|the 64 that this"),
        ((), '{"adapter": "small", "prompt": "\\ud800"}', "line 1: the prompt holds half of a sur"),
        (("--device", "meta"), "", "--device meta: "),
        (("--prompts", "none.jsonl"), "", "--prompts none.jsonl: "),
        (("--prompts", "none.txt"), "", "expected a .jsonl or a .tsv"),
        (("--adapter", "small"), "", "--adapter small: expected NAME=DIR"),
        (("--adapter", "base=."), "", "'base' is the model without an adapter"),
        (("--adapter", "small=."), "", "'small' was given twice"),
        (("--adapter", "x=no/such"), "", "--adapter x=no/such: there is no such folder"),
        (("--adapter", "x=."), None, "--adapter x=.: "),
        (("--model", "no/such"), None, "--model no/such: there is no such folder"),
        (("--seed", "1"), "", "--seed is for --do-sample"),
        (("--top-k", "3"), "", "--top-k is for --do-sample"),
        (("--length-penalty", "1"), "", "--length-penalty is for --num-beams"),
        (("--num-beams", "2", "--do-sample"), "", "--do-sample with --num-beams"),
        (("--num-return-sequences", "2"), "", "a search of 1 beam has no more"),
    ],
)
def test_what_cannot_work_is_one_line(given, tmp_path, monkeypatch, capsys, more, prompts, message):
    monkeypatch.chdir(tmp_path)
    words = list(given[0])
    if prompts:
        (tmp_path / "p.jsonl").write_text(prompts)
        words += ["--prompts", str(tmp_path / "p.jsonl")]
    assert cli.main([*words, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fadapt generate: ")
    assert err.count("\n") == 1
    assert any(part in err for part in message.split("|"))


@pytest.mark.parametrize(
    "words", [("--seed", str(2**63)), ("--num-beams", "2", "--length-penalty", "nan")]
)
def test_numbers_that_nothing_can_be_made_of_are_one_line(given, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*given[0], *words])
    assert re.search(r": expected a .*(under 9|finite)", capsys.readouterr().err)
