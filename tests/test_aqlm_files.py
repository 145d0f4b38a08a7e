"""Models of AQLM layers: made, written, loaded by transformers, adapted, merged into."""

import json

import pytest
import torch
from aqlm import QuantizedLinear
from small_lm import make_model
from torch import nn
from torch.func import functional_call

import fadapt as fa
from fadapt.aqlm_files import quantize_model, save_aqlm_model
from fadapt.errors import ConfigError, UnsupportedLayerError
from fadapt.models import load_model, quiet
from fadapt.testing import assert_pure


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("dense")), "dense")


@pytest.fixture(scope="module")
def model(dense):
    # A fresh one a module; 3 bits an element.
    return assert_pure(
        lambda: quantize_model(dense, in_group_size=4, nbits_per_codebook=6, generator=seeded()),
        dense,
    )


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation="eager"
        )
    return model.eval()


IDS = torch.arange(24).reshape(2, 12)


def test_a_folder_that_transformers_loads(dense, model, tmp_path):
    assert all(type(m) is not QuantizedLinear for m in dense.modules())
    layers = {p: m for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    assert type(model.lm_head) is nn.Linear
    assert_pure(lambda: save_aqlm_model(model, tmp_path), model)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "aqlm"
    assert (told["num_codebooks"], told["nbits_per_codebook"]) == (2, 6)
    loaded = load(tmp_path)
    for path, layer in layers.items():
        other = loaded.get_submodule(path)
        assert type(other) is QuantizedLinear
        assert torch.equal(other.codes, layer.codes)
        assert torch.equal(fa.base_of(other).dequantize(), fa.base_of(layer).dequantize())
    method = fa.LoRA(rank=2)
    params = fa.init(method, loaded, generator=seeded())
    assert set(params) == set(layers)
    with torch.no_grad():
        y = fa.bind(loaded, method)(params, IDS).logits
        # Over two blocks in float32, products summed in another order than AQLM's.
        torch.testing.assert_close(y, loaded(IDS).logits, rtol=1e-4, atol=1e-5)
        # That ran the layers. Written again, the files hold the same.
        save_aqlm_model(loaded, tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(IDS).logits, loaded(IDS).logits)


def test_codes_of_layers_that_have_run_are_written_in_order(tmp_path):
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = load_model(make_model(tmp_path / "dense"), "dense").config
        config.num_hidden_layers, config.intermediate_size = 1, 16
        whole = LlamaForCausalLM(config).eval()
    # 256 entries and square layers: a forward permutes the codes, and no shape tells.
    model = quantize_model(whole, in_group_size=1, num_codebooks=1, generator=seeded())
    before = {
        p: fa.base_of(m).codes.clone() for p, m in model.named_modules() if hasattr(m, "codes")
    }
    with torch.no_grad():
        model(IDS)
    save_aqlm_model(model, tmp_path / "aqlm")
    loaded = load(tmp_path / "aqlm")
    assert all(torch.equal(loaded.get_submodule(p).codes, codes) for p, codes in before.items())


def test_sweeps_take_a_model_encoded_on_the_spot(dense, tmp_path):
    folder = make_model(tmp_path / "dense")
    model = load_model(folder, "aqlm")
    again = load_model(folder, "aqlm")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    for path, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[path])
    # 2 x 8 bits for groups of 8: 512 vectors for the 32 to 48 groups of these layers are exact
    # up to float32's rounding.
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = dense.get_submodule(path).weight
            torch.testing.assert_close(fa.base_of(layer).dequantize(), weight, rtol=0, atol=1e-6)


def test_a_state_for_a_square_layer_that_has_run():
    """What merging hands a layer lies as that layer holds its codes."""
    from aqlm_layers import quantized, used

    from fadapt.merging import named

    fresh, ran = quantized((2, 8, 8, 1), 128, 16), used(quantized((2, 8, 8, 1), 128, 16))
    x = torch.randn(2, 128, generator=seeded())
    for layer in (fresh, ran):
        y = functional_call(layer, named(layer, fa.base_of(layer)), x)
        assert torch.equal(y, ran(x))


def test_what_cannot_be_written_or_made(dense, model, tmp_path):
    with pytest.raises(UnsupportedLayerError, match="0 AQLM layers"):
        save_aqlm_model(dense, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"q_proj.*1 x 5"):
        quantize_model(dense, in_group_size=5, generator=seeded())
    with pytest.raises(ConfigError, match=r"no .*Linear to quantize"):
        quantize_model(model.model.norm, generator=seeded())
    with pytest.raises(ConfigError, match="nowhere"):
        quantize_model(dense, second_moments={"nowhere": torch.eye(2)}, generator=seeded())
