"""OFT's and DoRA's checkpoints, both ways with real PEFT (law 9)."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fadapt as fa
from fadapt.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
    # Of PEFT's adjusting a block size, which one of the cases is about.
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
]

EPS = torch.finfo(torch.float32).eps


def model_of(kind: str = "dense") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    if kind == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    return model


def moved(model: nn.Module, config: Any, std: float) -> Any:
    """PEFT around a copy of the model, every parameter that it trains moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += std * torch.randn_like(parameter)
    return wrapped


def both_ways(model: nn.Module, config: Any, folder: Path, std: float) -> tuple[Any, Any]:
    wrapped = moved(model, config, std)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = wrapped(x)
        assert (want - model(x)).abs().max() > 1e-2 * want.abs().max()
    wrapped.save_pretrained(folder / "theirs")
    params, method = fa.load_peft(folder / "theirs", model)
    y = fa.bind(model, method)(params, x)
    assert (y - want).abs().max() <= 64 * EPS * want.abs().max()
    fa.save_peft(folder / "ours", params, method, model)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "ours").eval()
    with torch.no_grad():
        assert (again(x) - want).abs().max() <= 64 * EPS * want.abs().max()
    theirs, ours = (load_file(folder / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    assert fa.load_peft(folder / "ours", model)[1] == method
    return params, method


OFT = {
    "default": {"oft_block_size": 4},
    "exact": {"oft_block_size": 2, "use_cayley_neumann": False},
    "terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 7},
    "two-terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 2},
    "blocks": {"oft_block_size": 0, "r": 2},
    "shared": {"oft_block_size": 4, "block_share": True, "module_dropout": 0.25},
    "coft": {"oft_block_size": 4, "coft": True, "eps": 0.5, "use_cayley_neumann": False},
    "adjusted": {"oft_block_size": 6},  # 8 inputs of the second layer: PEFT takes 8 or 4
}


@pytest.mark.parametrize("name", OFT)
def test_oft_both_ways(name: str, tmp_path: Path):
    config = peft.OFTConfig(target_modules=["0", "2"], **OFT[name])
    _, method = both_ways(model_of(), config, tmp_path, 0.05)
    assert method.form == ("own" if method.cayley == "exact" else "peft")


DORA = {
    "default": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"0": 2}, "alpha_pattern": {"2": 10}},
}


@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_dora_both_ways(name: str, kind: str, tmp_path: Path):
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["0", "2"], **DORA[name])
    _, method = both_ways(model_of(kind), config, tmp_path, 0.2)
    assert type(method) is fa.DoRA
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert "base_model.model.0.lora_magnitude_vector" in keys


def drawn(method: Any, model: nn.Module) -> Any:
    g = torch.Generator().manual_seed(0)
    fresh = fa.init(method, model, generator=g)
    return tree_map(lambda t: t + 0.2 * torch.randn(t.shape, generator=g), fresh)


@pytest.mark.parametrize("cayley", ["neumann", "auto"])
def test_our_own_series_has_a_type_of_its_own_which_peft_refuses(cayley: str, tmp_path: Path):
    model, method = model_of(), fa.OFT(block_size=4, cayley=cayley, terms=6, targets=["0", "2"])
    params = drawn(method, model)
    fa.save_peft(tmp_path, params, method, model)
    again, same = fa.load_peft(tmp_path, model)
    assert same == method
    assert all(torch.equal(again[p].oft_R, params[p].oft_R) for p in params)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FADAPT_OFT"
    with pytest.raises((ValueError, KeyError), match="FADAPT_OFT"):
        peft.PeftModel.from_pretrained(model, tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_version": "0.17.1"}, "PEFT 0.18 changed that series"),
        ({"peft_version": None}, "PEFT 0.18 changed that series"),
        ({"r": 3}, "one of them"),
        ({"oft_block_size": 0}, "one of them"),
        ({"bias": "oft_only"}, r"lacks the key .*base_layer.bias"),
        ({"num_cayley_neumann_terms": 1}, "terms must be"),
        ({"block_share": True}, r"r = 1 \(block_share\)"),
        ({"peft_type": "BOFT"}, "fadapt reads"),
    ],
)
def test_what_oft_refuses_to_read(changes: Any, words: str, tmp_path: Path):
    model, method = model_of(), fa.OFT(block_size=4, cayley="neumann", form="peft", targets=["0"])
    fa.save_peft(tmp_path, drawn(method, model), method, model)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        fa.load_peft(tmp_path, model)


@pytest.mark.parametrize("method", [fa.OFT(block_size=4, targets=["0"]), fa.DoRA(targets=["0"])])
def test_what_was_prepared_is_not_saved(method: Any, tmp_path: Path):
    model = model_of()
    prepared: dict[str, Tensor] = fa.bind(model, method).prepare(drawn(method, model))
    with pytest.raises(CheckpointError, match="save the adapter itself"):
        fa.save_peft(tmp_path, prepared, method, model)
