"""``fadapt export``: a folder and its adapters as one graph, from the shell."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_lm import make_adapters
from test_export_cache import greedy
from torch.utils._pytree import tree_leaves

import fadapt as fa
from fadapt import check_export, cli, load_export
from fadapt.models import load_model
from fadapt.named_adapters import load_bank

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
METHODS = {
    "low": fa.LoRA(rank=2, alpha=8, targets=["q_proj"]),
    "oft": fa.OFT(block_size=4, targets=["v_proj"]),
    "ragged": fa.LoRA(rank=5, targets=["up_proj", "q_proj"]),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    words = ["export", *make_adapters(root, METHODS)]
    return words, root


def test_int8_with_a_cache_gives_the_tokens_of_generate(given, capsys):
    words, root = given
    out = root / "model.onnx"
    assert cli.main([*words, "--out", str(out), "--base", "int8", "--kv-cache"]) == 0
    ids = json.loads((root / "model.onnx.json").read_text())["ids"]
    assert set(ids) == {"base", *METHODS}
    assert ", ".join(f"{name} = {k}" for name, k in ids.items()) in capsys.readouterr().out
    inputs = {"input_ids": torch.tensor([[5, 6, 7]] * 4), "attention_mask": torch.ones(4, 3).long()}
    names = ["ragged", "base", "oft", "low"]
    past = {
        f"past_key_values.{n}.{part}": torch.zeros(4, 2, 0, 8)
        for n in range(2)
        for part in ("key", "value")
    }
    model = load_model(root / "model", "int8")
    model.generation_config.eos_token_id = None
    bank = load_bank(model, {name: root / name for name in METHODS})
    held = load_file(f"{out}.bank.safetensors")
    leaves = [held[f"bank_{k}"] for k in range(len(held))]
    assert all(torch.equal(*two) for two in zip(leaves, tree_leaves(bank.params), strict=True))
    got = greedy(load_export(out), names, inputs, bank, past)
    assert torch.equal(got, fa.generate(model, bank, names, **inputs, max_new_tokens=6)[:, 3:])
    check_export(out, model, bank.method)


def test_baked_adapters_are_in_the_file_alone(given):
    words, root = given
    out = root / "baked.pt2"
    (root / "baked.pt2.bank.safetensors").touch()  # of an export before, with other adapters
    assert cli.main([*words, "--out", str(out), "--bake"]) == 0
    assert sorted(p.name for p in root.glob("baked*")) == ["baked.pt2", "baked.pt2.json"]
    model = load_model(root / "model", "dense", length=None)
    bank = load_bank(model, {name: root / name for name in METHODS})
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        (got,) = load_export(out)(["oft"], inputs)  # the file knows the name
        want = fa.bind_mixed(model, bank.method)(bank.params, bank.ids(["oft"]), tokens).logits
    assert (got - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()
    check_export(out, model, bank.method, bank)
    renamed = load_bank(model, {name[::-1]: root / name for name in METHODS})
    with pytest.raises(fa.errors.CheckpointError, match="stale: ids"):
        check_export(out, model, bank.method, renamed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "m.gguf"], "export to m.gguf: expected one of .aoti.pt2, .pt2, .onnx"),
        (["--out", "none/m.onnx"], "there is no folder none"),
        (["--out", "m.pt2", "--external-data"], "opset= and external_data= are ONNX's"),
        (["--out", "m.onnx", "--adapter", "base=."], "is the model without an adapter"),
        (["--out", "m.onnx", "--adapter", "x=none"], "there is no such folder"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(given, capsys, more, message):
    words, _ = given
    assert cli.main([*words, *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
