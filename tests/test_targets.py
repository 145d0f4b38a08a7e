"""Targets: PEFT's rules, with PEFT as the oracle, and every case in which it says nothing."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import fadapt as fa
from fadapt.errors import ConfigError, TargetError, UnsupportedLayerError
from fadapt.targets import exact_pattern, find_targets, pattern_values


def linear() -> nn.Module:
    return nn.Linear(4, 4, device="meta")


def tree(**children) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def decoder() -> nn.Module:
    """Eleven blocks (so that 1 is the start of 10), a norm, experts in a list of their own."""
    blocks = [
        tree(
            attn=tree(**{f"{n}_proj": linear() for n in "qkvo"}),
            norm=nn.LayerNorm(4, device="meta"),
            mlp=tree(
                up=linear(), experts=nn.ModuleList(tree(up=linear(), down=linear()) for _ in "ab")
            ),
        )
        for _ in range(11)
    ]
    return tree(
        embed=nn.Embedding(8, 4, device="meta"), layers=nn.ModuleList(blocks), lm_head=linear()
    )


MODEL = decoder()
NAMES = [name for name, _ in MODEL.named_modules()]
LINEAR = {name for name, m in MODEL.named_modules() if isinstance(m, nn.Linear)}

SPELLED = """
    q_proj v_proj up down lm_head attn.o_proj 1.mlp.up 0.up layers.1.attn.q_proj
    layers.10.mlp.experts.1.down proj dwn qproj attn norm embed 1
"""
ENDINGS = st.sampled_from(SPELLED.split())
SPELLED = r"""
    .*\.(q|v)_proj layers\.[0-3]\.attn\..*_proj .*up .*head lm_head q_proj .*experts.*\.down .*
    layers\.1\..*up .*norm (?i).*Q_PROJ
"""
EXPRESSIONS = st.sampled_from(SPELLED.split())
LISTS = st.lists(ENDINGS, min_size=1, max_size=3, unique=True)


def unused(patterns, names=NAMES):
    """The patterns of a list that match no module: what PEFT skips and we do not."""
    if isinstance(patterns, str):
        return [patterns] if not any(re.fullmatch(patterns, n) for n in names) else []
    return [p for p in patterns if not any(n == p or n.endswith(f".{p}") for n in names)]


@given(
    targets=LISTS | EXPRESSIONS,
    exclude=st.just([]) | LISTS | EXPRESSIONS,
    blocks=st.just([]) | st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True),
    pattern=st.sampled_from([[], ["layers"], ["experts"], ["h", "layers"]]),
    saved=st.sampled_from([[], ["lm_head"], ["attn"], ["mlp.experts"]]),
)
@example(targets=["0.up"], exclude=[], blocks=[0, 1], pattern=[], saved=[])
@settings(max_examples=200, deadline=None)
def test_what_is_found_is_what_peft_finds(targets, exclude, blocks, pattern, saved):
    config = SimpleNamespace(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=blocks,
        layers_pattern=pattern,
        modules_to_save=saved,
        target_parameters=None,
    )
    # PEFT answers an exclusion with an object that is true, so ask for its class.
    answers = {n: check_target_module_exists(config, n) for n in NAMES}
    theirs = {n for n, a in answers.items() if a and type(a).__name__ != "_ExcludedModule"}
    try:
        ours = set(find_targets(MODEL, targets, exclude, blocks, pattern, saved))
    except TargetError:
        reasons = [
            unused(targets),
            unused(exclude) if exclude else [],
            not theirs,
            theirs - LINEAR,
            blocks and isinstance(targets, str),
            blocks,
        ]
        assert any(reasons)
        if not any(reasons[:5]):
            # An index that holds no target, which PEFT skips: alone it finds nothing.
            assert any(not _in_block(theirs, b, pattern) for b in blocks)
    else:
        assert ours == theirs
        assert not unused(targets)


def _in_block(found, block, pattern):
    # PEFT's expressions; without a pattern, of any list: the first number after two components.
    lists = [rf"(?:^|.*?\.){p}" for p in pattern] or [r".*?\.[^.]*"]
    each = [[m for p in lists if (m := re.match(rf"{p}\.(\d+)\.", n))] for n in found]
    return any(matches and int(matches[0][1]) == block for matches in each)


def tiny(kind: str) -> nn.Module:
    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
        "max_position_embeddings": 16,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**small))
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "v_proj"]),
        ("llama", r"model\.layers\.1\..*(gate|down)_proj"),
        ("gpt2", "all-linear"),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("bert", "all-linear"),
        ("bert", ["query", "output.dense"]),
    ],
)
# PEFT's own: it calls a method that transformers 5.23 renamed, and corrects itself on GPT-2.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_on_transformers_models_peft_adapts_the_same_layers(kind, targets):
    model = tiny(kind)
    ours = list(find_targets(model, targets))
    config = LoraConfig(target_modules=targets)
    theirs = get_peft_model(copy.deepcopy(model), config).targeted_module_names
    assert ours == theirs
    assert list(fa.bind(model, fa.LoRA(rank=2, targets=targets)).layers) == theirs


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"targets": ["up", "dwn"]}, r"targets: 'dwn' matches no module.*'down'"),
        ({"targets": ["layers.1.attn.qproj"]}, r"Near misses: .*'layers.1.attn.q_proj'"),
        ({"targets": "q_proj"}, r"whole path\. Some paths end in it: write \['q_proj'\]"),
        ({"targets": ".*qproj"}, "matches no module's whole path"),
        ({"targets": "(q"}, r"'\(q' is not a regular expression"),
        ({"targets": []}, "empty list"),
        ({"targets": ["attn"]}, r"not linear layers: 'layers.0.attn \(Module\)'.*and 3 more"),
        ({"targets": ["norm"]}, "LayerNorm"),
        ({"targets": ["up"], "exclude": ["downn"]}, "exclude: 'downn'.*'down'"),
        ({"targets": ["up"], "exclude": "up"}, r"exclude: .*write \['up'\]"),
        ({"targets": ["up"], "exclude": ["up"]}, "all of them are excluded"),
        ({"targets": ["lm_head"], "modules_to_save": ["lm_head"]}, "all of them are excluded"),
        ({"targets": ["up"], "modules_to_save": ["lmhead"]}, "modules_to_save: 'lmhead'.*lm_head"),
        ({"targets": ["up"], "layers_to_transform": [1, 11]}, r"block \[11\]; blocks with.*0, 1"),
        ({"targets": ".*up", "layers_to_transform": [1]}, "into the regular expression"),
        (
            {"targets": ["up"], "layers_to_transform": [1], "layers_pattern": ["h"]},
            r"layers_pattern=\['h'\]",
        ),
    ],
)
def test_whatever_matches_nothing_is_an_error_with_near_misses(keywords, message):
    with pytest.raises(TargetError, match=f"(?s){message}"):
        find_targets(MODEL, **keywords)
    with pytest.raises(TargetError, match=f"(?s){message}"):  # and by every door
        fa.bind(MODEL, fa.LoRA(**keywords))


def test_the_order_is_the_models_and_a_shared_module_is_listed_once():
    shared = nn.Linear(4, 4)
    model = tree(b=shared, a=nn.Linear(4, 4), c=shared)
    assert list(find_targets(model, ["a", "c"])) == ["b", "a"]
    assert list(find_targets(model, ["c"])) == ["b"]
    assert list(find_targets(model, "all-linear", exclude=["c"])) == ["a"]


def test_a_target_inside_a_target():
    class Outer(nn.Linear):
        pass

    fa.register_base(Outer, lambda layer: fa.Dense(layer.weight.detach()))
    outer = Outer(4, 4)
    outer.inner = nn.Linear(4, 4)
    model = tree(outer=outer)
    with pytest.raises(TargetError, match=r"'outer.inner' lies inside target 'outer'"):
        find_targets(model, "all-linear")
    assert list(find_targets(model, "all-linear", exclude=["inner"])) == ["outer"]


def test_layers_that_no_base_reads():
    with pytest.raises(TargetError, match="finds no linear layer"):
        find_targets(nn.LayerNorm(4), "all-linear")
    model = nn.MultiheadAttention(4, 2)
    with pytest.raises(UnsupportedLayerError, match=r"'out_proj'.*never calls"):
        fa.bind(model, fa.LoRA(targets=["out_proj"]))


@given(
    st.dictionaries(
        st.sampled_from(
            ["up", "q_proj", r"1\.mlp\.up", r"layers\.\d\..*up", "attn.v_proj", "prj", "q|up"]
        ),
        st.integers(1, 9),
        max_size=4,
    )
)
def test_patterns_of_ranks_are_looked_up_as_peft_does(patterns):
    paths = list(find_targets(MODEL, ["q_proj", "v_proj", "up"]))
    want = {}
    for path in paths:
        # PEFT: the first key that matches, or the path itself, for which there is no entry.
        key = get_pattern_key(patterns.keys(), path)
        if key in patterns:
            want[path] = patterns[key]
    if all(any(get_pattern_key([key], p) == key for p in paths) for key in patterns):
        assert pattern_values(patterns, paths, "rank_pattern") == want
    else:
        with pytest.raises(TargetError, match="'prj' matches none"):
            pattern_values(patterns, paths, "rank_pattern")


def test_a_key_of_a_pattern_must_match_an_adapted_layer():
    method = fa.LoRA(targets=["up"], rank_pattern={"upp": 4})
    with pytest.raises(TargetError, match=r"rank_pattern: 'upp' matches none.*'up'"):
        fa.bind(MODEL, method)
    method = fa.LoRA(targets=["up"], alpha_pattern={"q_proj": 4.0})
    with pytest.raises(TargetError, match="alpha_pattern: 'q_proj' matches none of the 33"):
        fa.bind(MODEL, method)


def test_exact_pattern_matches_these_paths_and_no_other():
    paths = ["a.b", "a", "layers.1.up"]
    assert list(find_targets(MODEL, exact_pattern(["layers.1.mlp.up"]))) == ["layers.1.mlp.up"]
    assert [
        p for p in [*paths, "aXb", "layers.10.up"] if re.fullmatch(exact_pattern(paths), p)
    ] == (paths)


@pytest.mark.parametrize(
    "keywords",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"init": "kaimign"},
        {"init": "orthogonal", "rank": 3},
        {"rank_pattern": {"up": 0}},
        {"alpha_pattern": {"up": float("inf")}},
        {"dtype": torch.int8},
    ],
)
def test_hyperparameters_out_of_range(keywords):
    with pytest.raises(ConfigError):
        fa.LoRA(**keywords)
