"""describe: one row a layer, of every format; and the table that ``fadapt inspect`` prints."""

import torch
from aqlm_layers import quantized
from cases import BASES
from small_lm import make_model
from torch import nn

import fadapt as fa
from fadapt import cli
from fadapt.testing import assert_pure


def test_every_format_is_told_by_its_own_numbers():
    layers = {b.name.replace("-", "_"): b.layer(16, 8) for b in BASES}
    model = nn.ModuleDict(layers)
    rows = {row.path: row for row in assert_pure(lambda: fa.describe(model), model)}
    assert list(rows) == list(layers)
    for path, layer in layers.items():
        row, base = rows[path], fa.base_of(layer)
        assert row.kind == type(base).__name__
        assert row.shape == (8, 16)
        assert row.transform == row.export == "yes"
        assert row.dtypes.endswith(str(base.dtype).removeprefix("torch."))
    assert rows["dense_f32"][3:6] == ("float32", "none", 4 * (16 * 8 + 8))
    int8 = rows["int8_group_f32"]
    assert int8[3:6] == ("int8 -> float32", "a scale for 4 of a row", 128 + 4 * 32 + 4 * 8)
    assert rows["int4_group_f32"].dtypes == "int4 in int8 -> float32"
    assert rows["inc_f32"].granularity == "a scale for all"
    assert rows["inc_channel_bf16"].dtypes == "float8_e4m3fn -> bfloat16"
    assert rows["aqlm_2x8_f32"].merge.startswith("on request")
    assert rows["float8_row_f32"].merge == "yes"


def test_what_cannot_be_adapted_says_why():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    (row,) = fa.describe(nn.Sequential(Odd(4, 3)))
    assert row.kind == "Odd"
    assert row.transform.startswith("no: ")
    assert "register_base" in row.transform
    assert row.bytes == 4 * 15


def test_aqlm_counts_codes_and_codebooks():
    layer = quantized((2, 8, 8, 1), 64, 16)
    (row,) = fa.describe(layer)
    assert row.granularity == "2 codes of 256 entries for 8 weights"
    tensors = (layer.codes, layer.codebooks, layer.scales, layer.bias)
    assert row.bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_inspect_prints_it(tmp_path, capsys):
    model = make_model(tmp_path / "model", layers=1)
    assert cli.main(["inspect", str(model), "--base", "int8"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out
    assert "int8 -> float32" in out
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert torch.is_grad_enabled()
