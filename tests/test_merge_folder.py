"""``fadapt merge``: a model's folder and PEFT folders into a new folder; resumed, and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fadapt as fa
from fadapt import merge_folder as folder_module
from fadapt.cli import main
from fadapt.errors import AdapterError, CheckpointError
from fadapt.merge_folder import merge_folder
from fadapt.models import SHIPPED

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
    quantized = shutil.copytree(model, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantized \(aqlm\)"):
        merge_folder(quantized, [adapter], out)
    assert not out.exists()


def test_a_tied_head_is_refused_by_name(folders, tmp_path):
    model, _ = folders
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    method = fa.LoRA(rank=2, targets=["lm_head"])
    params = fa.init(method, base, generator=torch.Generator().manual_seed(0))
    fa.save_peft(tmp_path / "adapter", params, method)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight'.*tied"):
        merge_folder(model, [tmp_path / "adapter"], tmp_path / "out")
