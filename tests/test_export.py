"""One exported graph of a mixed batch: equal to eager for other sizes, ids and adapters."""

import json
import zipfile

import onnx
import onnxruntime
import pytest
import torch
from cases import BASES, dense, randomized
from torch.utils._pytree import tree_leaves
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transforms import error

import fadapt as fa
from fadapt import check_export, export, load_export
from fadapt.bases import int8
from fadapt.purity import snapshot

CONFIGS = {
    "dense": None,
    "int8": Int8WeightOnlyConfig(),
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
}
# ONNX's exporter and its optimiser, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TARGETS = ["q_proj", "down_proj"]
AXES = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}


def assert_pure(fn, *things):
    """As fadapt's, but for torch's and the exporters' loggers, which come with their first use."""
    before = snapshot(*things)
    fn()
    after = snapshot(*things)
    changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    assert not [k for k in changed if k in before and not k.startswith("logger torch.")]
    assert all(k.startswith("logger ") for k in changed)


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
    return load_export(path)(ids, inputs, bank)[0]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_other_sizes_ids_and_adapters_need_no_other_export(tmp_path, monkeypatch, suffix):
    model, method = llama("dynamic"), fa.LoRA(rank=4, targets=TARGETS)
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
    # A .pt2 runs torch's own operations. Of ONNX Runtime's, those between the layers differ in the
    # last bit, which takes an activation that lies between two of the 255 steps to the other.
    bound = 1 / 127 if suffix == ".onnx" else 16 * torch.finfo(torch.float32).eps
    assert error(got, want) <= bound
    assert error(got[1], model(**inputs).logits[1]) <= bound
    if suffix == ".onnx":
        assert int8_in(path) == 7
        check_flips(path, model, wide, other, monkeypatch)


def check_flips(path, model, method, bank, monkeypatch):
    """What the first layers multiply are eager's integers, but where x lies between two steps."""
    rounded, held = [], int8.round_activation

    def watched(x, *rest):
        rounded.append((x, *held(x, *rest)))
        return rounded[-1][1:]

    monkeypatch.setattr(int8, "round_activation", watched)
    inputs, ids = tokens(64, 32), torch.arange(64) % 6 - 1
    fa.bind_mixed(model, method)(bank, ids, **inputs)
    graph = onnx.load(path)
    codes = [node.input[0] for node in graph.graph.node if node.op_type == "MatMulInteger"]
    given = [ids, *inputs.values(), *tree_leaves(bank)]
    feed = {i.name: t.numpy() for i, t in zip(graph.graph.input, given, strict=True)}
    for name in codes:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None)
        graph.graph.output.append(value)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    found = session.run(codes, feed)
    x, want, scale, _ = rounded[0]
    got = torch.from_numpy(found[0]).reshape(want.shape)
    flips = got != want
    place = (x.double() / scale.double())[flips]
    # The norm before it differs by some eps, in x and in the largest x, which makes the scale. A
    # negative largest one is always there: it is rounded at -127.5.
    apart = 127.5 * 8 * torch.finfo(torch.float32).eps
    assert (((place - place.floor()) - 0.5).abs() <= apart).all()
    assert (got.int() - want.int()).abs().max() <= 1
    assert flips.double().mean() <= 1e-3


def test_a_layer_rounds_its_activations_as_eager_does(tmp_path):
    """Bit for bit on what lies exactly, or all but, between two steps; of all sizes; of zeros."""
    layer = dense(64, 8)
    quantize_(layer, CONFIGS["dynamic"])
    model, method, bank = stacked(layer, 2, 2, 0)
    g = torch.Generator().manual_seed(0)
    size = (2 ** torch.randint(-20, 20, (500, 1), generator=g)).float()
    between = torch.randint(-127, 127, (500, 64), generator=g) + 0.5
    between[:, 0] = 127.5
    plain = torch.randn(500, 64, generator=g)
    scales = torch.randn(500, 1, generator=g).exp()
    x = torch.cat([between * size, between * scales, plain * size, plain * scales, 0 * plain])
    ids, want = torch.full((len(x),), -1), model(x)
    for suffix in (".pt2", ".onnx"):
        path = tmp_path / f"graph{suffix}"
        export(model, method, path, bank=bank, inputs={"input": x[:2]}, dynamic=BATCH)
        assert torch.equal(run(path, ids, {"input": x}, bank), want)


def int8_in(path):
    """How many weights, not scales or constants, the ONNX file holds as int8."""
    held = onnx.load(path, load_external_data=False).graph.initializer
    return sum(i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1 for i in held)


def stacked(layer, k, rank, seed, kind=fa.LoRA):
    """A layer as a model, and a bank for it."""
    model = torch.nn.Sequential(layer).eval().requires_grad_(False)
    method = kind(rank=rank, alpha=rank, targets=["0"])
    return model, method, bank_of(model, method, k, seed)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_integers_are_multiplied_as_integers(tmp_path, suffix):
    # Sums of 4096 products of two bytes have more bits than a float32 holds.
    layer = dense(4096, 8)
    quantize_(layer, CONFIGS["dynamic"])
    model, method, bank = stacked(layer, 2, 2, 0)
    path, at = tmp_path / f"graph{suffix}", {"input": {0: "batch"}}
    x = torch.randn(4, 3, 4096, generator=torch.Generator().manual_seed(0))
    export(model, method, path, bank=bank, inputs={"input": x[:2]}, dynamic=at)
    got = run(path, torch.tensor([-1, 0, 1, -1]), {"input": x}, bank)
    want = fa.bind_mixed(model, method)(bank, [-1, 0, 1, -1], x)
    assert torch.equal(got[[0, 3]], want[[0, 3]])
    assert error(got, want) <= 4 * torch.finfo(torch.float32).eps
    if suffix == ".onnx":
        assert "MatMulInteger" in {node.op_type for node in onnx.load(path).graph.node}


ROWS = [row for row in BASES if row.name in (
    "int8-group-f32", "float8-row-f32", "int4-group-f32", "inc-f32", "aqlm-2x8-f32",
)]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_base_of_float32_activations_is_an_onnx_graph_of_its_own_codes(tmp_path, row):
    model, method, bank = stacked(row.layer(16, 8), 2, 2, 0)
    path, at = tmp_path / "graph.onnx", {"input": {0: "batch", 1: "tokens"}}
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    export(model, method, path, bank=bank, inputs={"input": x[:2, :3]}, dynamic=at)
    got = run(path, torch.tensor([0, -1, 1, 1]), {"input": x}, bank)
    want = fa.bind_mixed(model, method)(bank, [0, -1, 1, 1], x)
    assert error(got, want) <= 4 * torch.finfo(torch.float32).eps
    held = onnx.load(path).graph.initializer
    bytewide = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
    assert sum(i.data_type in bytewide and len(i.dims) > 1 for i in held) == 1
    assert not any(list(i.dims) in ([8, 16], [16, 8]) for i in held if i.data_type == 1)


def test_what_onnx_has_no_form_for_is_an_error_that_says_so(tmp_path):
    row = next(row for row in BASES if row.name == "int4-dynamic-bf16")
    model, method, bank = stacked(row.layer(16, 8), 2, 2, 0)
    given = {"inputs": {"input": torch.ones(2, 16, dtype=row.dtype)}, "dynamic": BATCH}
    with pytest.raises(fa.errors.ConfigError, match=r"Round.*bfloat16.*export it in float32"):
        export(model, method, tmp_path / "g.onnx", bank=bank, **given)
    assert not list(tmp_path.iterdir())
    model, method, bank = stacked(dense(16, 8).bfloat16(), 2, 2, 0)
    path, given = tmp_path / "g.onnx", {"inputs": {"input": torch.ones(2, 16).bfloat16()}}
    export(model, method, path, bank=bank, dynamic=BATCH, **given)  # for a GPU, say
    with pytest.raises(fa.errors.CheckpointError, match=r"has no bfloat16: export .* in float32"):
        load_export(path)


BATCH = {"input": {0: "batch"}}
MIXED = [
    fa.LoRA(rank=2, alpha=3, targets=["0"]),
    fa.LoRA(rank=5, targets=["0", "2"], rank_pattern={"2": 1}),
    fa.OFT(block_size=8, targets=["2"], cayley="exact"),
    fa.DoRA(rank=3, targets=["0", "2"]),
]


def kinds_of(methods, seed):
    """A small model, and a bank of these adapters."""
    model = torch.nn.Sequential(dense(8, 16), torch.nn.Tanh(), dense(16, 8)).eval()
    g = torch.Generator().manual_seed(seed)
    each = [randomized(fa.init(m, model, generator=g), seed + k) for k, m in enumerate(methods)]
    bank, unit = fa.stack(each, methods=methods)
    mixed = fa.bind_mixed(model, unit)
    return model, unit, bank, mixed


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_several_methods_and_ranks_in_one_graph(tmp_path, suffix):
    model, unit, bank, mixed = kinds_of(MIXED, 0)
    path, x = tmp_path / f"graph{suffix}", torch.randn(9, 8, generator=torch.Generator())
    given = {"inputs": {"input": x[:2]}, "dynamic": BATCH}
    export(model, unit, path, bank=bank, **given)
    bound = 16 * torch.finfo(torch.float32).eps
    ids = torch.tensor([0, 3, -1, 2, 1, -1, 3, 0, 2])
    assert error(run(path, ids, {"input": x}, mixed.prepare(bank)), mixed(bank, ids, x)) <= bound
    # Other numbers of each kind, and other ranks.
    wide = fa.LoRA(rank=6, targets=["0", "2"])
    _, _, other, others = kinds_of([*MIXED[:2], wide, *MIXED[2:3] * 2, *MIXED[3:] * 2], 5)
    ids = torch.tensor([6, 0, -1, 3, 4, 2, 5, 1, -1])
    got = run(path, ids, {"input": x}, others.prepare(other))
    assert error(got, others(other, ids, x)) <= bound


def test_kinds_in_turns_are_baked_or_refused(tmp_path):
    model, unit, bank, mixed = kinds_of([MIXED[0], MIXED[2], MIXED[1]], 0)
    path, x = tmp_path / "graph.onnx", torch.ones(4, 8)
    given = {"inputs": {"input": x[:2]}, "dynamic": BATCH}
    with pytest.raises(fa.errors.ConfigError, match="kinds in turns"):
        export(model, unit, path, bank=bank, **given)
    export(model, unit, path, bank=bank, bake=True, **given)  # its rotations are made once
    ids = torch.tensor([2, 1, -1, 0])
    got = run(path, ids, {"input": x}, None)
    assert error(got, mixed(bank, ids, x)) <= 16 * torch.finfo(torch.float32).eps
    check_export(path, model, unit, bank)


def test_external_data_and_opset(tmp_path, monkeypatch):
    model, method, bank = stacked(dense(16, 8), 2, 2, 0)
    path, x = tmp_path / "graph.onnx", torch.ones(3, 16)
    given = {"bank": bank, "inputs": {"input": x[:2]}, "dynamic": BATCH}
    data = tmp_path / "graph.onnx.data"
    monkeypatch.setattr("fadapt.export_onnx.INLINE_BYTES", 4 * 16 * 8)  # the weight's, not more
    export(model, method, path, **given, opset=18)
    assert data.stat().st_size >= 4 * 16 * 8
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 18
    ids = torch.tensor([1, -1, 0])
    want = fa.bind_mixed(model, method)(bank, ids, x)
    assert error(run(path, ids, {"input": x}, bank), want) <= 4 * torch.finfo(torch.float32).eps
    check_export(path, model, method)
    data.write_bytes(data.read_bytes()[::-1])
    with pytest.raises(fa.errors.CheckpointError, match="stale: data"):
        check_export(path, model, method)
    with pytest.raises(fa.errors.ConfigError, match=r"opset 3: .* wrote opset"):
        export(model, method, path, **given, opset=3)
    export(model, method, path, **given, external_data=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.onnx", "graph.onnx.json"]
    check_export(path, model, method)


def test_a_bank_that_is_an_input_is_not_in_the_file(tmp_path):
    model, method, bank = stacked(dense(16, 8), 2, 2, 0)
    bank = {"0": bank["0"]._replace(lora_A=torch.full((2, 2, 16), 1.2345))}
    path = tmp_path / "graph.pt2"
    export(model, method, path, bank=bank, inputs={"input": torch.ones(2, 16)}, dynamic=BATCH)
    with zipfile.ZipFile(path) as held:
        for name in held.namelist():
            assert bank["0"].lora_A[0].numpy().tobytes() not in held.read(name)
    assert path.stat().st_size < 2**17


def test_a_baked_bank_is_part_of_the_graph_and_of_its_manifest(tmp_path):
    model, method, path = llama("int8"), fa.LoRA(rank=2, targets=TARGETS), tmp_path / "graph.pt2"
    bank, inputs = bank_of(model, method, 3), tokens(2, 4)
    export(model, method, path, bank=bank, inputs=inputs, dynamic=AXES, bake=True)
    ids = torch.tensor([2, -1, 1])
    want = fa.bind_mixed(model, method)(bank, ids, **tokens(3, 6)).logits
    got = run(path, ids, tokens(3, 6), None)
    assert error(got, want) <= 64 * torch.finfo(torch.float32).eps
    program = torch.export.load(path)
    held = [*program.state_dict.values(), *program.constants.values()]
    # Each weight once, as plain tensors: no torchao is needed to load them.
    assert {type(t) for t in held} <= {torch.Tensor, torch.nn.Parameter}
    assert sum(t.dtype == torch.int8 for t in held) == 7
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
    turned = llama("int8")
    turned.config.rms_norm_eps = 1e-3
    with pytest.raises(fa.errors.CheckpointError, match="stale: model changed"):
        check_export(path, turned, method, bank)
    (named,) = load_export(path)([0], tokens(1, 6))
    assert named.shape == (1, 6, 64)
    with pytest.raises(fa.errors.AdapterError, match="the graph knows none"):
        load_export(path)(["a0"], tokens(1, 6))
    with pytest.raises(
        fa.errors.AdapterError, match=r"takes \['ids', 'input_ids', 'attention_mask'\]"
    ):
        load_export(path)([0], tokens(1, 6), bank)
    path.write_bytes(b"another")
    with pytest.raises(fa.errors.CheckpointError, match="not what its manifest tells"):
        load_export(path)
    with pytest.raises(fa.errors.CheckpointError, match="stale: graph"):
        check_export(path, model, method, bank)
    with pytest.raises(fa.errors.CheckpointError, match="no manifest"):
        check_export(tmp_path / "none.pt2", model, method)


def test_what_a_graph_would_run_wrongly_is_refused(tmp_path):
    """Another bank of as many leaves, a Bank for a graph that scales, ids that it would wrap."""
    model = torch.nn.Sequential(dense(8, 8), torch.nn.LayerNorm(8), dense(8, 8)).eval()
    first, last = (fa.LoRA(rank=2, targets=[path]) for path in ("0", "2"))
    scaled = fa.LoRA(rank=2, alpha=8, targets=["0"])
    bank, x = bank_of(model, first, 3), {"input": torch.ones(2, 8)}
    for name, method, bake in (("one", first, False), ("two", scaled, False), ("own", first, True)):
        path = tmp_path / f"{name}.pt2"
        export(model, method, path, bank=bank, inputs=x, dynamic=BATCH, bake=bake)
    call = load_export(tmp_path / "one.pt2")
    with pytest.raises(fa.errors.AdapterError, match=r"other leaves: .*'0'.*'2'"):
        call([0, 1], x, bank_of(model, last, 3))
    held = fa.Bank.holding(model, {"a": (fa.unstack(bank)[0], scaled)})
    assert call(["a", "base"], x, held)[0].shape == (2, 8)
    room = fa.Bank.of(model, first, capacity=2).add("a", fa.unstack(bank)[0], scaled)
    one = call(["a"], {"input": x["input"][:1]}, room)[0]  # which keeps a copy of the bank
    more = room.add("b", fa.unstack(bank)[1], scaled)  # in the same tensors
    got = call(["b", "a"], x, more)[0]
    want = fa.bind(model, scaled)(fa.unstack(bank)[1], x["input"][:1])
    assert error(got, torch.cat([want, one])) <= 8 * torch.finfo(torch.float32).eps
    with pytest.raises(fa.errors.AdapterError, match="scales its adapters otherwise"):
        load_export(tmp_path / "two.pt2")(["a", "base"], x, held)
    for ids in ([0, 3], [0, -2], [0.5, 1], [True, False], torch.tensor([0.0, 1.0])):
        for run, params in ((call, bank), (load_export(tmp_path / "own.pt2"), None)):
            with pytest.raises(fa.errors.AdapterError, match=r"^ids"):
                run(ids, x, params)
    # What an AOTInductor package would read past its end, and torch.export tells by its guards.
    wrong = {
        r"takes input as float32 \[batch, 8\]; got float32 \[2, 8\].*'batch': 3": ([0] * 3, x),
        r"takes input .* got float64 \[2, 8\]": ([0, 1], {"input": x["input"].double()}),
        r"takes input .* got float32 \[2, 4\]": ([0, 1], {"input": x["input"][:, :4]}),
        r"takes input .* got float32 \[2, 1, 8\]": ([0, 1], {"input": x["input"][:, None]}),
        r"takes ids as int64 \[batch\]; got int64 \[0\]": ([], {"input": x["input"][:0]}),
    }
    for match, given in wrong.items():
        with pytest.raises(fa.errors.AdapterError, match=match):
            call(*given, bank)
    A, B = bank["0"]
    for leaf in ((A[:, :1], B), (A, B[:2]), (A[..., :4], B), (A.double(), B.double())):
        with pytest.raises(fa.errors.AdapterError, match=r"takes bank_\d as float32 \[adapters"):
            call([0, 1], x, {"0": fa.LoRAParams(*leaf)})
    assert call(torch.tensor([0, 1], dtype=torch.int32), x, bank)[0].shape == (2, 8)
    check_export(tmp_path / "one.pt2", model, first)
    model[1].eps = 0.5  # no tensor, and no configuration tells of it
    with pytest.raises(fa.errors.CheckpointError, match="stale: model changed"):
        check_export(tmp_path / "one.pt2", model, first)
    for text in ("[]", "{}"):
        (tmp_path / "one.pt2.json").write_text(text)
        with pytest.raises(fa.errors.CheckpointError, match="this version of fadapt"):
            load_export(tmp_path / "one.pt2")


def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path):
    model, method = llama("dense"), fa.LoRA(rank=2, targets=TARGETS)
    bank = bank_of(model, method, 2)
    with pytest.raises(fa.errors.ConfigError, match=r"expected one of \.aoti\.pt2, \.pt2"):
        export(model, method, tmp_path / "g.pt", bank=bank, inputs=tokens(2, 3), dynamic=AXES)
    with pytest.raises(fa.errors.ConfigError, match="at least 2"):
        export(model, method, tmp_path / "g.pt2", bank=bank, inputs=tokens(1, 3), dynamic=AXES)
    more = {"bank": bank, "inputs": tokens(2, 3), "dynamic": AXES}
    with pytest.raises(fa.errors.ConfigError, match=r"ONNX's, and g\.pt2 is \.pt2"):
        export(model, method, tmp_path / "g.pt2", **more, opset=21)
    with pytest.raises(fa.errors.ConfigError, match="kv_cache=True makes them itself"):
        export(model, method, tmp_path / "g.pt2", **more, kv_cache=True)
    with pytest.raises(fa.errors.ConfigError, match="there is no folder"):
        export(model, method, tmp_path / "no" / "g.pt2", **more)
    with pytest.raises(fa.errors.ConfigError, match=r"input_ids \[2, 3\] has no axis 2"):
        export(model, method, tmp_path / "g.pt2", **more | {"dynamic": {"input_ids": {2: "a"}}})
    with pytest.raises(fa.errors.ConfigError, match="'bank_0' would have the name"):
        export(
            model,
            method,
            tmp_path / "g.pt2",
            **more | {"inputs": more["inputs"] | {"bank_0": bank}},
        )
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "folder.onnx.data").touch()
    with pytest.raises(fa.errors.ConfigError, match="it is a folder"):
        export(model, method, tmp_path / "folder.onnx", **more)
    named = fa.Bank.of(model, method).add("a", fa.unstack(bank)[0], method)
    with pytest.raises(fa.errors.ConfigError, match=r"pass bank\.method"):
        export(model, method, tmp_path / "g.pt2", **more | {"bank": named})
    assert len(list(tmp_path.iterdir())) == 2  # what was there, and no more
