"""Checkpoint folders that cannot be read as they stand: each says what is wrong, and where."""

import json
import os
import warnings

import pytest
import torch
from cases import randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

import fadapt as fa
from fadapt.errors import CheckpointError
from fadapt.testing import assert_pure

KEY = "base_model.model."


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
            self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.down(self.up(x).tanh()))


MODEL, X = Model(), torch.linspace(-1, 1, 12).reshape(2, 6)
METHOD = fa.LoRA(rank=2, alpha=3, targets=["up", "down"], modules_to_save=["head"])


def adapter(method=METHOD, seed=0):
    return randomized(fa.init(method, MODEL, generator=torch.Generator().manual_seed(0)), seed)


@pytest.fixture
def folder(tmp_path):
    fa.save_peft(tmp_path, adapter(), METHOD, MODEL)
    return tmp_path


def edit(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(folder, *parts, model=MODEL):
    with pytest.raises(CheckpointError) as error:
        fa.load_peft(folder, model)
    for part in parts:
        assert part in str(error.value), (part, str(error.value))


def test_reading_and_writing_are_pure(folder):
    params, method = assert_pure(lambda: fa.load_peft(folder, MODEL), MODEL)
    assert_pure(lambda: fa.save_peft(folder, params, method, MODEL), MODEL, params)
    got = fa.bind(MODEL, method)(params, X)
    assert torch.equal(got, fa.bind(MODEL, METHOD)(adapter(), X))


def test_what_was_loaded_is_no_longer_the_file(folder):
    params, _ = fa.load_peft(folder, MODEL)
    path = folder / "adapter_model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    want = tree_leaves(adapter())
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(params), want, strict=True))
    params["up"].lora_A.add_(1)  # and it can be written to


def test_folders(tmp_path, folder):
    assert_refused(tmp_path / "nowhere", "not there", "snapshot_download")
    assert_refused(folder / "adapter_config.json", "is a file")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "adapter_config.json", "nothing")
    (folder / "adapter_config.json").write_text("{")
    assert_refused(folder, "not JSON")
    (folder / "adapter_config.json").write_text("[]")
    assert_refused(folder, "JSON object")


def test_weights_files(folder):
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(folder, "safetensors", f"{size} bytes")
    path.unlink()
    assert_refused(folder, "has no adapter_model.safetensors")
    torch.save({}, folder / "adapter_model.bin")
    assert_refused(folder, "pickle", "adapter_model.bin", "save_file")


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        (KEY + "upp.lora_A.weight", ["upp", "Near misses: 'up'"]),
        (KEY + "up.lora_a.weight", ["nothing claims", "up.lora_a.weight"]),
        (KEY + "head.lora_A.weight", ["head", "does not target"]),
        (KEY + "up.lora_B.bias", ["up.lora_B.bias", "not part of"]),
        (KEY + "up.lora_magnitude_vector", ["up.lora_magnitude_vector"]),
        (KEY + "up.lora_embedding_A", ["up.lora_embedding_A"]),
        (KEY + "extra.weight", ["extra.weight"]),
        ("up.lora_A.weight", ["up.lora_A.weight", "base_model.model."]),
    ],
)
def test_unknown_keys(folder, key, parts):
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(2, 6)}))
    assert_refused(folder, *parts)


@pytest.mark.parametrize("name", ["up.lora_A.weight", "down.lora_B.weight", "head.bias"])
def test_missing_keys(folder, name):
    rewrite(folder, lambda tensors: tensors.pop(KEY + name))
    assert_refused(folder, KEY + name)


def test_missing_layers(folder):
    def drop(tensors):
        del tensors[KEY + "up.lora_A.weight"], tensors[KEY + "up.lora_B.weight"]

    rewrite(folder, drop)
    assert_refused(folder, "lacks 'up'")


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        ("up.lora_A.weight", (2, 7), ["'up'", "[r, 6]", "[2, 7]"]),
        ("up.lora_A.weight", (3, 6), ["'up'", "[3, 6]", "[2, in]"]),
        ("down.lora_B.weight", (5, 2), ["'down'", "[6, r]", "[5, 2]"]),
        ("head.weight", (4, 6), ["'head.weight'", "[4, 6]", "[3, 6]"]),
    ],
)
def test_wrong_shapes(folder, name, shape, parts):
    rewrite(folder, lambda tensors: tensors.update({KEY + name: torch.zeros(shape)}))
    assert_refused(folder, *parts)


def test_the_base_s_own_tensors(folder):
    # PEFT writes embeddings if in doubt: the same values change nothing, others would.
    rewrite(folder, lambda tensors: tensors.update({KEY + "up.weight": MODEL.up.weight.detach()}))
    fa.load_peft(folder, MODEL)
    rewrite(folder, lambda tensors: tensors.update({KEY + "up.weight": torch.zeros(8, 6)}))
    assert_refused(folder, "up.weight", "load_state_dict")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "some"),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {}),
        ("kasa_config", {"beta": 0.1}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("target_parameters", ["up.weight"]),
        ("trainable_token_indices", [0, 1]),
        ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"num_groups": 2}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_4"),
        ("option_of_a_later_version", 1),
        ("option_of_a_later_version", False),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("r", "2"),
        ("r", 0),
        ("lora_alpha", "x"),
        ("lora_dropout", 1.5),
        ("rank_pattern", [1]),
        ("rank_pattern", {"up": 2.5}),
        ("target_modules", "("),
        ("target_modules", 3),
    ],
)
def test_options_that_are_refused(folder, option, value):
    edit(folder, **{option: value})
    # A value that the method itself refuses is told in the method's words.
    own = {"0": "rank", "{'up': 2.5}": "rank", "1.5": "dropout", "(": "regular expression"}
    assert_refused(folder, own.get(str(value), option))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("option_of_a_later_version", None),
        ("init_lora_weights", False),
        ("init_lora_weights", "eva"),
        ("eva_config", {"rho": 2.0}),
        ("loftq_config", {"loftq_bits": 4}),
        ("megatron_core", "other"),
        ("qalora_group_size", 8),
        ("task_type", "CAUSAL_LM"),
        ("inference_mode", False),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("fan_in_fan_out", True),
        ("peft_version", "9.9"),
        ("target_modules", None),
        ("rank_pattern", None),
    ],
)
def test_options_that_change_nothing(folder, option, value):
    edit(folder, **{option: value})
    params, method = fa.load_peft(folder, MODEL)
    got = fa.bind(MODEL, method)(params, X)
    assert torch.equal(got, fa.bind(MODEL, METHOD)(adapter(), X))


def test_what_matches_nothing_is_left_out_with_a_warning(folder):
    edit(folder, target_modules=["up", "down", "query"], rank_pattern={"gate": 7})
    with pytest.warns(UserWarning, match="rank_pattern: gate.*target_modules: query"):
        params, method = fa.load_peft(folder, MODEL)
    assert torch.equal(fa.bind(MODEL, method)(params, X), fa.bind(MODEL, METHOD)(adapter(), X))


def test_a_layer_under_two_names(tmp_path, folder):
    model = Model()
    model.again = model.up
    assert_refused(folder, "2 names", "'again'", model=model)


def test_what_cannot_be_saved(tmp_path):
    params = adapter()
    many = fa.stack([params, params])
    unit = fa.stack([params, params], methods=[METHOD, METHOD])[1]
    for bad, method, part in [
        (many, METHOD, "[2, 2, 6]"),
        (many, unit, "unstack"),
        (params, fa.LoRA(rank=4, targets=["up", "down"]), "rank 4"),
        (params, fa.LoRA(rank=2, targets=["up", "down"], lora_bias=True), "lora_B.bias"),
        ({"": params["up"]}, fa.LoRA(rank=2), "path ''"),
    ]:
        with pytest.raises(CheckpointError) as error:
            fa.save_peft(tmp_path / "new", bad, method)
        assert part in str(error.value)
    partial = {p: leaf for p, leaf in params.items() if p != "up"}
    with pytest.raises(CheckpointError, match="1 missing"):
        fa.save_peft(tmp_path / "new", partial, METHOD, MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        fa.save_peft(tmp_path / "file", params, METHOD)
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_leaves_the_old_adapter(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fa.save_peft(folder, adapter(seed=1), METHOD)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("when", range(3))
def test_a_write_that_is_cut_short_is_never_a_mixture(folder, monkeypatch, when):
    # Every call that changes the folder is one after which the process may end.
    calls, replace, unlink = [], os.replace, type(folder).unlink

    def step(do, *args):
        calls.append(do)
        if len(calls) > when:
            raise KeyboardInterrupt
        return do(*args)

    other = fa.LoRA(rank=2, alpha=30, targets=["up", "down"], modules_to_save=["head"])
    old, new = adapter(), adapter(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: step(replace, *args))
        patch.setattr(
            type(folder),
            "unlink",
            lambda path, missing_ok=False: (
                unlink(path, True) if path.name[0] == "." else step(unlink, path)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            fa.save_peft(folder, new, other)
    assert all(p.name[0] == "a" for p in folder.iterdir())  # no temporary file
    if when == 0:
        params, method = fa.load_peft(folder, MODEL)
        assert (method.alpha, params["up"].lora_A.equal(old["up"].lora_A)) == (3, True)
    else:
        assert_refused(folder, "has no adapter_config.json")


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        fa.LoRA,
        rank=st.integers(1, 4),
        alpha=st.one_of(st.none(), st.integers(1, 9), st.floats(0.1, 9)),
        targets=st.sampled_from([["up"], ["up", "down"], "up|down", "all-linear"]),
        rslora=st.booleans(),
        dropout=st.sampled_from([0.0, 0.5]),
        lora_bias=st.booleans(),
        rank_pattern=st.dictionaries(st.sampled_from(["up", "u."]), st.integers(1, 5)),
        alpha_pattern=st.dictionaries(st.just("up"), st.integers(1, 5)),
        modules_to_save=st.sampled_from([[], ["head"]]),
    ),
    st.booleans(),
)
def test_a_round_trip_is_the_same_function_and_the_same_bytes(tmp_path_factory, method, told):
    folder = tmp_path_factory.mktemp("round")
    params = adapter(method, seed=2)
    fa.save_peft(folder, params, method, MODEL if told else None)
    again, loaded = fa.load_peft(folder, MODEL)
    assert again.keys() == params.keys()
    assert torch.equal(fa.bind(MODEL, loaded)(again, X), fa.bind(MODEL, method)(params, X))
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    fa.save_peft(folder, again, loaded, MODEL if told else None)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first


def test_without_safetensors_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("fadapt.peft_files.find_spec", lambda name: None)
    assert_refused(folder, "pip install")
    with pytest.raises(CheckpointError, match="pip install"):
        fa.save_peft(folder, adapter(), METHOD)


def test_a_config_of_an_old_version(folder):
    old = {"base_model_name_or_path": "a/b", "bias": "none", "enable_lora": None, "r": 2}
    old |= {"fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 3, "lora_dropout": 0.05}
    old |= {"merge_weights": False, "modules_to_save": ["head"], "peft_type": "LORA"}
    old |= {"target_modules": ["up", "down"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(old))
    params, method = fa.load_peft(folder, MODEL)
    assert method.dropout == 0.05
    assert torch.equal(fa.bind(MODEL, method)(params, X), fa.bind(MODEL, METHOD)(adapter(), X))


VALUES = [None, True, 0, -1, 7, 1.5, 1e400, "", "x", "(", [], [1], ["x"], [None], {}, {"x": 1}]
VALUES += [{"up": -1}, {"(": 1}, {"up": "x"}, [["up"]], "up"]


@pytest.mark.filterwarnings("ignore:adapter_config.json:UserWarning")
def test_any_value_of_any_option_loads_or_is_a_checkpoint_error(folder):
    path = folder / "adapter_config.json"
    whole = json.loads(path.read_text())
    loaded = 0
    for option in whole:
        for value in VALUES:
            path.write_text(json.dumps(whole | {option: value}))
            try:
                params, method = fa.load_peft(folder, MODEL)
            except CheckpointError:
                continue
            assert fa.bind(MODEL, method)(params, X).shape == (2, 3)
            loaded += 1
    assert loaded > len(whole)  # null at the least is an option's default


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 255), st.booleans())
def test_any_broken_byte_loads_or_is_a_checkpoint_error(tmp_path_factory, where, byte, weights):
    folder = tmp_path_factory.mktemp("bytes")
    fa.save_peft(folder, adapter(), METHOD)
    path = folder / ("adapter_model.safetensors" if weights else "adapter_config.json")
    data = bytearray(path.read_bytes())
    data[where % len(data)] = byte
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params, method = fa.load_peft(folder, MODEL)
    except CheckpointError:
        return
    assert fa.bind(MODEL, method)(params, X).shape == (2, 3)
