"""One exported graph of a mixed batch: equal to eager for other sizes, ids and adapters."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import randomized
from torch.utils._pytree import tree_leaves
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transforms import error

import fadapt as fa
from fadapt import check_export, export
from fadapt.testing import assert_pure

CONFIGS = {
    "dense": None,
    "int8": Int8WeightOnlyConfig(),
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
}
# ONNX's exporter and its optimiser, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TARGETS = ["q_proj", "down_proj"]
AXES = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory):
    """The exporters register their loggers when they are first used."""
    model, method = torch.nn.Sequential(torch.nn.Linear(8, 4)), fa.LoRA(rank=2)
    for suffix in (".pt2", ".onnx"):
        path = tmp_path_factory.mktemp("first") / f"g{suffix}"
        bank, inputs = bank_of(model, method, 2), {"input": torch.ones(3, 8)}
        export(model, method, path, bank=bank, inputs=inputs, dynamic={"input": {0: "batch"}})


def llama(base):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    if CONFIGS[base] is not None:
        quantize_(model.model, CONFIGS[base])
    return model


def bank_of(model, method, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    fresh = fa.init(method, model, generator=g)
    return fa.stack([randomized(fresh, seed + s) for s in range(k)])


def tokens(batch, length):
    g = torch.Generator().manual_seed(batch)
    ids = torch.randint(64, (batch, length), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(path, ids, inputs, bank):
    leaves = [] if bank is None else tree_leaves(bank)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(ids, list(inputs.values()), leaves)
    session = onnxruntime.InferenceSession(path)
    given = [ids, *inputs.values(), *leaves]
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("base", CONFIGS)
def test_other_sizes_ids_and_adapters_need_no_other_export(tmp_path, base, suffix):
    model, method = llama(base), fa.LoRA(rank=4, targets=TARGETS)
    bank, path = bank_of(model, method, 3), tmp_path / f"graph{suffix}"
    assert_pure(
        lambda: export(model, method, path, bank=bank, inputs=tokens(3, 5), dynamic=AXES),
        model,
        bank,
    )
    wide = fa.LoRA(rank=6, alpha=6, targets=TARGETS)  # the same scaling, another K and rank
    other, inputs = bank_of(model, wide, 5, seed=7), tokens(4, 7)
    ids = torch.tensor([1, -1, 0, 4])
    want = fa.bind_mixed(model, wide)(other, ids, **inputs).logits
    got = run(path, ids, inputs, other)
    # What rounds its activations multiplies them as floats here and as integers in eager mode: the
    # last bit may take an element to the next of 255 steps.
    bound = 1 / 127 if base == "dynamic" else 64 * torch.finfo(torch.float32).eps
    assert error(got, want) <= bound
    plain = model(**inputs).logits
    assert error(got[1], plain[1]) <= bound
    if suffix == ".onnx":
        held = onnx.load(path).graph.initializer
        int8 = [i for i in held if i.data_type == onnx.TensorProto.INT8]
        assert len(int8) == (0 if base == "dense" else 7)
        assert all(np.prod(i.dims) >= 32 * 32 for i in int8)


def test_a_baked_bank_is_part_of_the_graph_and_of_its_manifest(tmp_path):
    model, method, path = llama("int8"), fa.LoRA(rank=2, targets=TARGETS), tmp_path / "graph.pt2"
    bank, inputs = bank_of(model, method, 3), tokens(2, 4)
    export(model, method, path, bank=bank, inputs=inputs, dynamic=AXES, bake=True)
    ids = torch.tensor([2, -1, 1])
    want = fa.bind_mixed(model, method)(bank, ids, **tokens(3, 6)).logits
    got = run(path, ids, tokens(3, 6), None)
    assert error(got, want) <= 64 * torch.finfo(torch.float32).eps
    check_export(path, model, method, bank)
    changed = bank_of(model, method, 3, seed=1)
    with pytest.raises(fa.errors.CheckpointError, match="stale: adapters changed"):
        check_export(path, model, method, changed)
    with pytest.raises(fa.errors.CheckpointError, match="stale: weights"):
        check_export(path, llama("dense"), method, bank)
    with pytest.raises(fa.errors.CheckpointError, match="stale: weights"):  # the same codes
        check_export(path, llama("dynamic"), method, bank)
    with pytest.raises(fa.errors.CheckpointError, match="stale: method"):
        check_export(path, model, fa.LoRA(rank=2, alpha=5, targets=TARGETS), bank)
    about = json.loads((tmp_path / "graph.pt2.json").read_text())
    assert about["torch"] == torch.__version__
    path.write_bytes(b"another")
    with pytest.raises(fa.errors.CheckpointError, match="stale: graph"):
        check_export(path, model, method, bank)
    with pytest.raises(fa.errors.CheckpointError, match="no manifest"):
        check_export(tmp_path / "none.pt2", model, method)


def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path):
    model, method = llama("dense"), fa.LoRA(rank=2, targets=TARGETS)
    bank = bank_of(model, method, 2)
    with pytest.raises(fa.errors.ConfigError, match=r"expected one of \.pt2, \.onnx"):
        export(model, method, tmp_path / "g.pt", bank=bank, inputs=tokens(2, 3), dynamic=AXES)
    with pytest.raises(fa.errors.ConfigError, match="at least 2"):
        export(model, method, tmp_path / "g.pt2", bank=bank, inputs=tokens(1, 3), dynamic=AXES)
    assert not list(tmp_path.iterdir())
