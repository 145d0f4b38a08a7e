"""``fadapt sweep`` and ``fadapt train`` from the command line to the folders they leave."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from small_lm import make_model, make_texts
from transformers import AutoTokenizer, LlamaForCausalLM

import fadapt as fa
from fadapt import cli
from fadapt.corpus import read_corpus


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm")
    return make_model(root / "model"), make_texts(root / "texts")


def flags(paths, out, *more):
    model, texts = paths
    small = "--steps 6 --batch 2 --length 16 --eval-every 3 --save-every 2 --rank 2 3"
    return [
        *("sweep", "--model", str(model), "--data", str(texts), "--out", str(out)),
        *small.split(),
        *more,
    ]


def test_a_sweep_trains_and_leaves_its_files(paths, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(flags(paths, out, "--lr", "0.02", "--steps", "30")) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "4 adapters at once" in told.out
    rows = json.loads((out / "results.json").read_text())["adapters"]
    assert {r["name"] for r in rows} == {p.name for p in (out / "adapters").iterdir()}
    assert len(rows) == 4
    gains = [r["base_loss"] - r["held_out_loss"] for r in rows]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.1  # nats: one sentence twelve times over is learned at once
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def stop_after(path, seconds=60.0):
    """SIGTERM to this process as soon as the file at ``path`` has been replaced once."""

    def watch():
        end, first = time.monotonic() + seconds, None
        while time.monotonic() < end:
            found = path.stat().st_mtime_ns if path.exists() else None
            first = first or found
            if found != first:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def contents(out):
    files = [*sorted((out / "adapters").rglob("*.safetensors")), out / "state.safetensors"]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def same_run(a, b):
    """The same bytes in every adapter and in the state, where the order of metadata may differ."""
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys()
    assert len(one) == 5
    for name in one:
        if name == "state.safetensors":
            first, second = load(one[name]), load(two[name])
            assert first.keys() == second.keys()
            assert all(torch.equal(first[k], second[k]) for k in first)
        else:
            assert one[name] == two[name], name


LONG = ("--lr", "0.02", "--steps", "40", "--dropout", "0.1")


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    """The run that the interrupted ones must end as."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(flags(paths, out, *LONG)) == 0
    return out


def test_a_run_that_was_stopped_and_resumed_ends_on_the_same_bytes(paths, whole, tmp_path, capsys):
    cut = tmp_path / "cut"
    before = signal.getsignal(signal.SIGTERM)
    thread = stop_after(cut / "state.safetensors")
    assert cli.main(flags(paths, cut, *LONG)) == 128 + signal.SIGTERM
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    told = capsys.readouterr().out
    assert f"go on with: fadapt sweep --resume --out {cut}" in " ".join(told.split())
    assert not (cut / "adapters").exists()
    assert cli.main(["sweep", "--resume", "--out", str(cut)]) == 0
    same_run(whole, cut)


def test_a_run_that_was_killed_resumes_from_its_last_state(paths, whole, tmp_path):
    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-m", "fadapt", *flags(paths, cut, *LONG)])
    state = cut / "state.safetensors"
    first = None
    while process.poll() is None:
        found = state.stat().st_mtime_ns if state.exists() else None
        first = first or found
        if found != first:
            process.kill()
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert cli.main(flags(paths, cut, *LONG, "--resume")) == 0
    same_run(whole, cut)


def test_a_disk_that_is_full_is_told_and_leaves_the_state_as_it_was(paths, whole, tmp_path, capsys):
    out = tmp_path / "run"
    thread = stop_after(out / "state.safetensors")
    assert cli.main(flags(paths, out, *LONG)) == 128 + signal.SIGTERM
    thread.join()
    before = (out / "state.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        code = cli.main(["sweep", "--resume", "--out", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    told = capsys.readouterr().err
    assert "could not write" in told
    assert "what was there before is intact" in told
    assert (out / "state.safetensors").read_bytes() == before
    assert [p.name for p in out.iterdir()] == ["state.safetensors"]
    assert cli.main(["sweep", "--resume", "--out", str(out)]) == 0
    same_run(whole, out)


def test_one_wild_adapter_is_reported_and_the_others_are_saved_as_usual(paths, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(flags(paths, out, "--lr", "0.01", "1e30", "--rank", "2")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "lr1e+30: loss not finite at step" in told
    rows = json.loads((out / "results.json").read_text())["adapters"]
    frozen = {r["lr"]: r["frozen_at"] is not None for r in rows}
    assert frozen == {0.01: False, 1e30: True}
    assert [r["lr"] for r in rows[-2:]] == [1e30, 1e30]
    calm = tmp_path / "calm"
    assert cli.main(flags(paths, calm, "--lr", "0.01", "0.02", "--rank", "2")) == 0
    for text in ("python", "words"):
        name = f"{text}-lr0.01/adapter_model.safetensors"
        assert (out / "adapters" / name).read_bytes() == (calm / "adapters" / name).read_bytes()


# PEFT asks transformers for a name that the next one drops.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_saved_adapters_are_what_peft_loads_with_the_loss_that_the_table_tells(paths, tmp_path):
    peft = pytest.importorskip("peft")
    out = tmp_path / "run"
    assert cli.main(flags(paths, out, "--base", "dense", "--lr", "0.02")) == 0
    model = LlamaForCausalLM.from_pretrained(paths[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(paths[0])
    text = read_corpus(paths[1] / "words.jsonl", lambda t: tokenizer(t)["input_ids"], 0, 16)
    row = next(
        r
        for r in json.loads((out / "results.json").read_text())["adapters"]
        if r["name"] == "words-r3"
    )
    adapted = peft.PeftModel.from_pretrained(model, out / "adapters" / "words-r3")
    with torch.no_grad():
        logits = adapted(text.held[:, :-1].clamp(min=0)).logits
    labels = text.held[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
    assert row["held_out_loss"] == pytest.approx(loss.item(), rel=1e-5)  # float32, another order
    assert row["held_out_loss"] < row["base_loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "no/such"), "--model no/such: there is no such folder."),
        (("--model", "."), "--model .: no config.json in it"),
        (("--data", "no/such"), "--data no/such: there is no such file or folder."),
        (("--data", "."), "the folder has no .txt or .jsonl file"),
        (("--data", "empty.txt"), "empty.txt: the file holds no text."),
        (("--data", "short.txt"), "tokens are too few"),
        (("--data", "bad.jsonl"), "bad.jsonl, line 2: not JSON"),
        (("--targets", "q_prj"), "Near misses: 'q_proj'"),
        (("--length", "65"), "--length 65: this model reads at most 64 tokens."),
        (("--device", "nonsense"), "--device nonsense:"),
        (("--method", "oft", "--rank", "2"), "--method oft has a --block-size, no rank"),
        (("--block-size", "4"), "--block-size is for --method oft"),
        (("--method", "dora", "--rank", "2", "3"), "--rank 2 3: adapters of --method dora"),
        (("--steps", "3", "--epochs", "2"), "steps and epochs were both given"),
        (("--config", "no.json"), "--config no.json: "),
        (("--config", "typo.yaml"), "unknown setting 'rnak'. Near misses: 'rank'"),
        (("--config", "wrong.json"), "rank: expected a whole number of at least 1, got '0'"),
        (("--config", "choice.json"), "base: expected one of int8,"),
        (("--config", "bad.jsonl"), "--config bad.jsonl: "),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    paths, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"text": "a b c d"}\n{"text":\n')
    (tmp_path / "typo.yaml").write_text("rnak: 3\n")
    (tmp_path / "wrong.json").write_text('{"rank": [2, 0]}')
    (tmp_path / "choice.json").write_text('{"base": "int9"}')
    if more[0] == "--data" and more[1] == ".":
        monkeypatch.chdir(paths[0])
    given = [w for w in flags(paths, tmp_path / "out") if w not in ("--steps", "6")]
    assert cli.main([*given, *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("fadapt sweep: ")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_or_cut_off_are_told(paths, tmp_path, capsys):
    for name, change in {
        "missing": lambda tensors: tensors.pop("model.norm.weight"),
        "cut": None,
    }.items():
        folder = tmp_path / name
        shutil.copytree(paths[0], folder)
        file = folder / "model.safetensors"
        if change is None:
            file.write_bytes(file.read_bytes()[:-100])
        else:
            tensors = load(file.read_bytes())
            change(tensors)
            save_file(tensors, file, {"format": "pt"})
        assert cli.main(flags(paths, tmp_path / "out", "--model", str(folder))) == 2
        err = capsys.readouterr().err
        assert f"--model {folder}: " in err
        assert err.count("\n") == 1
        assert ("'model.norm.weight' among them" in err) == (name == "missing")


def test_resume_refuses_what_is_not_the_same_run(paths, tmp_path, capsys):
    out = tmp_path / "run"
    texts = tmp_path / "texts"
    shutil.copytree(paths[1], texts)
    model, given = shutil.copytree(paths[0], tmp_path / "model"), paths[1]
    paths = (model, texts)
    assert cli.main(["sweep", "--resume", "--out", str(out)]) == 2
    assert "there is no state to go on from" in capsys.readouterr().err
    assert cli.main(flags(paths, out, "--rank", "2")) == 0
    assert cli.main(flags(paths, out, "--rank", "2")) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert cli.main(flags(paths, out, "--rank", "3", "--resume")) == 2
    assert "rank: made with 2, now 3" in capsys.readouterr().err
    (texts / "words.jsonl").write_text('{"text": "something else was written here"}\n')
    assert cli.main(flags(paths, out, "--rank", "2", "--resume")) == 2
    assert "the texts changed since the run" in capsys.readouterr().err
    shutil.copy(given / "words.jsonl", texts)
    assert cli.main(flags(paths, out, "--rank", "2", "--resume")) == 0
    tensors = load_file(model / "model.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    assert cli.main(flags(paths, out, "--rank", "2", "--resume")) == 2
    assert "the model changed since the run" in capsys.readouterr().err
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:50])
    assert cli.main(flags(paths, out, "--rank", "2", "--resume")) == 2
    assert "not a state of fadapt" in capsys.readouterr().err


def test_train_goes_on_from_a_peft_folder_with_settings_of_a_file(paths, tmp_path, capsys):
    model, texts = paths
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {model}\ndata: {texts / 'words.jsonl'}\nlr: 1e-2\nsteps: 20\nlength: 16\n"
        "rank: 3\ntargets: q_proj,v_proj\nseed: [4]\n"
    )
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["train", "--config", str(config), "--out", str(first), "--rank", "2"]) == 0
    (row,) = json.loads((first / "results.json").read_text())["adapters"]
    lm = LlamaForCausalLM.from_pretrained(model)
    params, method = fa.load_peft(first / "adapter", lm)
    assert method.rank == 2  # the flag, over the file's 3
    assert {p.rsplit(".", 1)[-1] for p in params} == {"q_proj", "v_proj"}
    more = ["--data", str(texts / "words.jsonl"), "--length", "16", "--steps", "20"]
    start = ["train", "--model", str(model), *more, "--from", str(first / "adapter")]
    assert cli.main([*start, "--lr", "0.01", "--out", str(second)]) == 0
    (again,) = json.loads((second / "results.json").read_text())["adapters"]
    assert again["base_loss"] == row["base_loss"]
    assert again["held_out_loss"] < row["held_out_loss"]
    assert again["train_loss"] < row["train_loss"]
    assert cli.main([*start, "--rank", "4", "--out", str(tmp_path / "third")]) == 2
    assert "--rank: the adapter in" in capsys.readouterr().err
    assert cli.main(["train", "--data", str(texts)]) == 2
    assert "one adapter is trained on one file" in capsys.readouterr().err


def test_train_keeps_what_the_folder_says_unless_told_otherwise(paths, tmp_path):
    model, texts = paths
    about = {"model": str(model), "data": str(texts / "words.jsonl"), "length": 16, "steps": 2}
    fresh = {"method": "rslora", "rank": 3, "alpha": 4, "targets": "q_proj", "dropout": 0.3}
    (tmp_path / "a.json").write_text(json.dumps(about | fresh))
    (tmp_path / "b.json").write_text(json.dumps(about | {"from": str(tmp_path / "a" / "adapter")}))
    lm, found = LlamaForCausalLM.from_pretrained(model), {}
    for name, config, more in [("a", "a", ()), ("b", "b", ()), ("c", "b", ("--dropout", "0"))]:
        words = ["--config", str(tmp_path / f"{config}.json"), "--out", str(tmp_path / name)]
        assert cli.main(["train", *words, *more]) == 0
        _, found[name] = fa.load_peft(tmp_path / name / "adapter", lm)
    assert found["a"] == found["b"] == replace(found["c"], dropout=0.3)
    assert (found["a"].rank, found["a"].alpha, found["a"].rslora) == (3, 4, True)
    assert (found["a"].dropout, found["c"].dropout) == (0.3, 0)


def test_train_resumes_like_a_sweep(paths, tmp_path):
    model, texts = paths
    more = ["--model", str(model), "--data", str(texts / "python.txt"), "--length", "16"]
    more = ["train", *more, "--steps", "40", "--save-every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main([*more, "--out", str(whole)]) == 0
    thread = stop_after(cut / "state.safetensors")
    assert cli.main([*more, "--out", str(cut)]) == 128 + signal.SIGTERM
    thread.join()
    assert cli.main(["train", "--resume", "--out", str(cut)]) == 0
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (cut / name).read_bytes()


@pytest.mark.parametrize("method", ["dora", "oft"])
def test_other_methods_train_at_once_as_well_and_go_on_from_their_folders(paths, tmp_path, method):
    out, more = tmp_path / "many", ("--method", method, "--lr", "0.01", "0.02", "--steps", "20")
    given = flags(paths, out, *more)
    at = given.index("--rank")
    size = ("--block-size", "4") if method == "oft" else ("--rank", "2")
    assert cli.main([*given[:at], *size, *given[at + 3 :]]) == 0
    rows = {r["name"]: r for r in json.loads((out / "results.json").read_text())["adapters"]}
    best = rows["words-lr0.02"]
    assert best["held_out_loss"] < best["base_loss"] - 0.1
    # One alone, without vmap: the same loss.
    start = ["train", "--model", str(paths[0]), "--data", str(paths[1] / "words.jsonl")]
    start += ["--length", "16", "--steps", "20", "--lr", "0.02"]
    alone = tmp_path / "alone"
    assert cli.main([*start, "--method", method, *size, "--out", str(alone)]) == 0
    (one,) = json.loads((alone / "results.json").read_text())["adapters"]
    # Float32 in another order, through twenty steps of Adam.
    assert one["held_out_loss"] == pytest.approx(best["held_out_loss"], rel=1e-3)
    again = tmp_path / "again"
    assert cli.main([*start, "--from", str(alone / "adapter"), "--out", str(again)]) == 0
    (further,) = json.loads((again / "results.json").read_text())["adapters"]
    assert further["held_out_loss"] < one["held_out_loss"]


@pytest.mark.parametrize(
    ("base", "kind"), [("float8", "Float8"), ("aqlm", "Aqlm"), ("inc-fp8", "IncFp8")]
)
def test_another_base_is_made_and_trained_over(paths, tmp_path, capsys, base, kind):
    out, model = tmp_path / "run", make_model(tmp_path / "model", layers=1)
    more = ("--base", base, "--lr", "0.02", "--targets", "q_proj,down_proj")
    assert cli.main(flags((model, paths[1]), out, *more, "--steps", "20")) == 0
    assert f"2 {kind} layers, frozen" in capsys.readouterr().out
    best = json.loads((out / "results.json").read_text())["adapters"][0]
    assert best["held_out_loss"] < best["base_loss"] - 0.1
