"""``fadapt merge``: a model's folder and PEFT folders into a new folder; resumed, and refused."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import torch
from cases import randomized
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_lm import make_model
from torch import nn
from transformers import AutoModelForCausalLM

import fadapt as fa
from fadapt import merge_folder as folder_module
from fadapt.cli import main
from fadapt.errors import AdapterError, CheckpointError, ConfigError, MergeError
from fadapt.merge_folder import merge_folder
from fadapt.merging import merge_layers
from fadapt.models import SHIPPED, quiet
from fadapt.plan import plan

# PEFT asks transformers by a name that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


SHIPPED_MODEL = SHIPPED / "model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model in bfloat16 and several shards, and an adapter that PEFT itself saved."""
    root = tmp_path_factory.mktemp("merge")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.bfloat16)
    model.save_pretrained(root / "model", max_shard_size="600KB")
    (root / "model" / "note.txt").write_text("kept")
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    peft.save_pretrained(root / "adapter")
    return root / "model", root / "adapter"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A model of two layers and 14 linears in float32, in shards, and an adapter."""
    root = tmp_path_factory.mktemp("small")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            make_model(root / "whole"), dtype=torch.float32
        )
        model.save_pretrained(root / "model", max_shard_size="8KB")
    method = fa.LoRA(rank=2, targets=["q_proj", "down_proj"])
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    fa.save_peft(root / "adapter", randomized(fresh, 0), method)
    return root / "model", root / "adapter"


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_it_writes_what_peft_merges(folders, tmp_path, capsys):
    model, adapter = folders
    out = tmp_path / "out"
    assert len(list(model.glob("*.safetensors"))) > 2
    assert main(["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(out)]) == 0
    assert "merged 8 layers" in capsys.readouterr().out
    new, old = loaded(out), loaded(model)
    assert new.keys() == old.keys()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    changed = 0
    for name, tensor in new.items():
        assert tensor.dtype == torch.bfloat16
        if not any(t in name for t in ("q_proj", "down_proj")):
            assert torch.equal(tensor, old[name])
            continue
        changed += not torch.equal(tensor, old[name])
        # PEFT sums in bfloat16 what is summed in float32 here: a rounding of either term.
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-7, atol=2**-9)
    assert changed == 8
    assert {p.name for p in out.iterdir()} == {p.name for p in model.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in base.parameters())
    assert not list(tmp_path.glob(".*"))


def test_the_folder_is_what_merge_gives_and_two_adapters_are_rounded_once(folders, tmp_path):
    model, adapter = folders
    merge_folder(model, [adapter, adapter], tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    params, method = fa.load_peft(adapter, base)
    state = fa.merge(base, [params, params], method)
    new = loaded(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in state.items())


def test_methods_in_order_are_what_merge_gives(small, tmp_path):
    model, _ = small
    base = load(model)
    kinds = [
        fa.DoRA(rank=2, targets=["q_proj", "down_proj"]),
        fa.OFT(block_size=4, targets=["q_proj", "up_proj"]),
        fa.LoRA(rank=2, rslora=True, targets="all-linear", exclude=["lm_head"]),
    ]
    for k, kind in enumerate(kinds):
        g = torch.Generator().manual_seed(k)
        fa.save_peft(tmp_path / f"{k}", randomized(fa.init(kind, base, generator=g), k), kind)
    adapters = [tmp_path / f"{k}" for k in range(len(kinds))]
    merge_folder(model, adapters, tmp_path / "out")
    params, methods = zip(*(fa.load_peft(a, base) for a in adapters), strict=True)
    state, new = fa.merge(base, list(params), list(methods)), loaded(tmp_path / "out")
    assert len(state) == 14
    assert all(torch.equal(new[name], tensor) for name, tensor in state.items())


def test_a_stopped_run_goes_on_and_ends_on_the_same_bytes(folders, tmp_path):
    model, adapter = folders
    merge_folder(model, [adapter], tmp_path / "whole", rounding="stochastic", seed=3)

    class StopError(Exception):
        pass

    def stop(path: str, k: int, total: int) -> None:
        seen.append(path)
        if len(seen) == 5:
            raise StopError

    seen: list[str] = []
    out, options = tmp_path / "out", {"rounding": "stochastic", "seed": 3}
    with pytest.raises(StopError):
        merge_folder(model, [adapter], out, progress=stop, **options)
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial").glob("model*.s*")}
    assert finished
    rest: list[str] = []
    merge_folder(model, [adapter], out, progress=lambda *a: rest.append(a[0]), **options)
    assert 0 < len(rest) < 8
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert all((out / name).stat().st_mtime_ns == t for name, t in finished.items())
    # Another merge does not go on from this one's files.
    seen.clear()
    with pytest.raises(StopError):
        merge_folder(model, [adapter], tmp_path / "new", progress=stop, **options)
    rest.clear()
    merge_folder(model, [adapter], tmp_path / "new", progress=lambda *a: rest.append(a[0]))
    assert len(rest) == 8
    # Nor a merge of a model whose files were written anew, of the same names and sizes.
    trained = shutil.copytree(model, tmp_path / "trained")
    seen.clear()
    with pytest.raises(StopError):
        merge_folder(trained, [adapter], tmp_path / "last", progress=stop, **options)
    for path in trained.glob("*.safetensors"):
        save_file({n: 2 * t for n, t in load_file(path).items()}, path, {"format": "pt"})
    rest.clear()
    last = tmp_path / "last"
    merge_folder(trained, [adapter], last, progress=lambda *a: rest.append(a[0]), **options)
    assert len(rest) == 8


def test_refusals_come_before_any_work(folders, tmp_path, monkeypatch):
    model, adapter = folders
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        merge_folder(tmp_path, [adapter], out)
    with pytest.raises(CheckpointError, match="exists already"):
        merge_folder(model, [adapter], tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        full = usage._replace(free=1000)
        patch.setattr(folder_module.shutil, "disk_usage", lambda path: full)
        with pytest.raises(CheckpointError, match=r"has 1,000 left"):
            merge_folder(model, [adapter], out)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN"):
        merge_folder(model, [broken], out)
    cut = shutil.copytree(model, tmp_path / "cut")
    shard = sorted(cut.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut off"):
        merge_folder(cut, [adapter], out)
    raw = (model / shard.name).read_bytes()
    shard.write_bytes(re.sub(rb'"shape":\[\d', b'"shape":[9', raw, count=1))
    with pytest.raises(CheckpointError, match=r"its header gives '.*' BF16 \[9"):
        merge_folder(cut, [adapter], out)
    config = cut / "config.json"
    whole = json.loads(config.read_text())
    for text, words in (
        ("{", "is not that of a model"),
        ("[]", "is not that of a model"),
        (json.dumps(whole | {"quantization_config": "int8"}), "is not that of a model"),
        (json.dumps(whole | {"model_type": "lama"}), "model type `lama`"),
        (json.dumps(whole | {"num_attention_heads": 7}), "number of attention heads"),
    ):
        config.write_text(text)
        shutil.copy(model / shard.name, shard)
        with pytest.raises(CheckpointError, match=words):
            merge_folder(cut, [adapter], out)
    quantized = shutil.copytree(model, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantized \(gptq\)"):
        merge_folder(quantized, [adapter], out)
    for to, words in (
        ("inc-fp8", "calibration inputs.*save_inc_model"),
        ("bfloat16", "one floating dtype"),
        ("int9", "no such format"),
        ("int8-group48", r"'model\.layers\.0.*groups of 48 do not divide the 128"),
    ):
        with pytest.raises(ConfigError, match=words):
            merge_folder(model, [adapter], out, to=to)
    with pytest.raises(ConfigError, match="searched for, not rounded"):
        merge_folder(model, [adapter], out, to="aqlm-2x8", rounding="search")
    assert not out.exists()
    assert not list(tmp_path.glob(".out*/*.safetensors"))


def test_a_disk_that_fills_up_keeps_what_is_finished(folders, tmp_path, capsys):
    """A file cannot grow beyond a limit: the kernel refuses the write in the middle of it."""
    model, adapter = folders
    merge_folder(model, [adapter], tmp_path / "whole")
    sizes = {p.name: p.stat().st_size for p in model.glob("*.safetensors")}
    largest = max(sorted(sizes), key=sizes.get)
    assert largest != min(sizes)  # something is finished before it
    command = ["merge", "--model", str(model), "--adapter", str(adapter)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[largest] - 1, hard))
    try:
        code = main([*command, "--out", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert code == 2
    assert f"{largest}: File too large. What is finished is kept" in told
    work = tmp_path / ".out.partial"
    finished = {p.name for p in work.glob("*.safetensors")}
    assert finished
    assert largest not in finished
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_result_that_is_not_finite_leaves_nothing_behind(folders, tmp_path, capsys):
    model, adapter = folders
    huge = shutil.copytree(adapter, tmp_path / "huge")
    tensors = load_file(huge / "adapter_model.safetensors")
    name = max(n for n in tensors if "lora_B" in n)  # of the last layer: others come before it
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, huge / "adapter_model.safetensors")
    command = ["merge", "--model", str(model), "--adapter", str(huge)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "NaN or Inf" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]
    assert main([*command, "--out", str(tmp_path / "out"), "--unsafe"]) == 0


def test_a_killed_run_goes_on_and_ends_on_the_same_bytes(small, tmp_path):
    model, adapter = small
    merge_folder(model, [adapter], tmp_path / "whole", to="int8")
    child = (
        "import sys; from pathlib import Path; from fadapt.merge_folder import merge_folder\n"
        "def tell(*a): print(*a, flush=True); sys.stdin.readline()\n"  # a layer a line
        "m, a, o = map(Path, sys.argv[1:]); merge_folder(m, [a], o, to='int8', progress=tell)"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", child, *map(str, (model, adapter, out))]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as run:
        for _ in range(9):
            assert run.stdout.readline()
            run.stdin.write("\n")
            run.stdin.flush()
        run.kill()
    assert run.returncode == -9
    assert not out.exists()
    assert list((tmp_path / ".out.partial").glob("model*.safetensors"))
    rest: list[str] = []
    assert (
        merge_folder(model, [adapter], out, to="int8", progress=lambda *a: rest.append(a[0])) == 14
    )
    assert 0 < len(rest) < 14
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_tied_head_is_refused_by_name(folders, tmp_path):
    model, _ = folders
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    method = fa.LoRA(rank=2, targets=["lm_head"])
    params = fa.init(method, base, generator=torch.Generator().manual_seed(0))
    fa.save_peft(tmp_path / "adapter", params, method)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight'.*tied"):
        merge_folder(model, [tmp_path / "adapter"], tmp_path / "out")


def load(folder: Path):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TARGETS = ["int8", "int8-group8", "int8-dynamic", "float8", "int4-group8", "aqlm-2x4", "dense"]

ROUNDINGS = {"int4-group8": "search", "int8-dynamic": "stochastic"}


@pytest.mark.parametrize("saved", [False, True])
def test_a_tied_embedding_is_refused_and_one_of_its_own_is_merged(small, tmp_path, saved):
    """In a tied folder the embedding's tensor is the head's too, which the adapter leaves alone."""
    model, ids = load(small[0]), torch.arange(8)[None]
    targets, whole = (["q_proj"], ["embed_tokens"]) if saved else (["embed_tokens"], [])
    method = fa.LoRA(rank=2, targets=targets, modules_to_save=whole)
    fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
    params = randomized(fresh, 0)
    fa.save_peft(tmp_path / "adapter", params, method)
    with pytest.raises(MergeError, match=r"'model.embed_tokens' shares its weight with 'lm_head'"):
        merge_folder(small[0], [tmp_path / "adapter"], tmp_path / "out")
    with pytest.raises(MergeError, match=r"'model.embed_tokens' shares its weight with 'lm_head'"):
        fa.merge(model, params, method)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    # Where the file holds both, transformers reads them apart as soon as they differ.
    shutil.copytree(small[0].parent / "whole", tmp_path / "both")
    tensors = load_file(tmp_path / "both" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "both" / "model.safetensors", {"format": "pt"})
    merge_folder(tmp_path / "both", [tmp_path / "adapter"], tmp_path / "out")
    with torch.no_grad():
        got, want = load(tmp_path / "out")(ids).logits, fa.bind(model, method)(params, ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-5  # float32 sums


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """The folder written in each format."""
    model, adapter = small
    root = tmp_path_factory.mktemp("to")
    for to in TARGETS:
        how = ROUNDINGS.get(to, "nearest")
        assert merge_folder(model, [adapter], root / to, to=to, seed=3, rounding=how) == 14
    return root


@pytest.mark.parametrize("to", TARGETS)
def test_another_format_is_what_from_pretrained_loads(small, written, to):
    """All layers but the head, with the numbers that merged_model gives; run by the vendor."""
    model, adapter = small
    loaded, base = load(written / to), load(model)
    params, method = fa.load_peft(adapter, base)
    every = fa.LoRA(rank=method.rank, targets="all-linear", exclude=["lm_head"])
    whole = fa.init(every, base, generator=torch.Generator().manual_seed(0))
    assert len(whole) == 14
    todo = plan(base, [whole, params], [every, method])  # a fresh adapter changes nothing
    kind = {"dense": "Dense", "float8": "Float8", "int4": "Intx", "aqlm": "Aqlm"}
    for k, path in enumerate(todo.bases):
        g = torch.Generator().manual_seed(3 * 1_000_003 + k)
        ((_, _, merged),) = merge_layers(
            todo.only(path), to=to, generator=g, rounding=ROUNDINGS.get(to, "nearest")
        )
        found = fa.base_of(loaded.get_submodule(path))
        assert type(found).__name__ == kind.get(to.split("-")[0], "Int8")
        assert torch.equal(found.dequantize(), merged.base.dequantize())
    assert type(loaded.lm_head) is nn.Linear
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        got, want = loaded(ids).logits, fa.bind(base, method)(params, ids).logits
    error = float((got - want).norm() / want.norm())
    # What the rounding of every layer does to this model; dense: float32 sums.
    assert error < {"dense": 1e-5, "int8": 0.05, "float8": 0.2}.get(to.split("-")[0], 1.0)
    assert (
        "quantization_config" in json.loads((written / to / "config.json").read_text())
        or to == "dense"
    )


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("int8", None),
        ("int4-group8", None),
        ("int8-group8", "dense"),
        ("aqlm-2x4", "int8"),
        ("aqlm-2x4", "dense"),
        ("float8", "aqlm-2x4"),
    ],
)
def test_quantized_folders_are_merged_into_too(small, written, tmp_path, source, to):
    _, adapter = small
    model = written / source
    merge_folder(model, [adapter], tmp_path / "out", to=to, seed=1)
    base, new = load(model), load(tmp_path / "out")
    params, method = fa.load_peft(adapter, base)
    for path, leaf in params.items():
        old, now = (fa.base_of(m.get_submodule(path)) for m in (base, new))
        if to is None:
            assert type(now) is type(old)
        want = method.merge(old.dequantize(torch.float32), leaf)
        error = (now.dequantize(torch.float32) - want).norm() / want.norm()
        assert error < {None: 0.2, "int8": 0.02, "dense": 0.01}.get(to, 0.5)
        assert error < 0.9 * (old.dequantize(torch.float32) - want).norm() / want.norm() or to
    if to is None:  # what has no adapter keeps its bytes
        other = "model.layers.0.self_attn.k_proj"
        assert torch.equal(
            fa.base_of(base.get_submodule(other)).codes(),
            fa.base_of(new.get_submodule(other)).codes(),
        )


def test_aqlm_folders_without_another_format_are_refused(small, written, tmp_path):
    with pytest.raises(MergeError, match=r"is AQLM: .*to='int8'"):
        merge_folder(written / "aqlm-2x4", [small[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
