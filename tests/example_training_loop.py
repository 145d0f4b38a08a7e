from pathlib import Path

import torch
import torchopt
from torchao.quantization import Int8WeightOnlyConfig, PerRow, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

import fadapt as fa

data = Path(fa.__file__).parent / "data"  # ships with fadapt; any causal LM and texts will do
lm = data / "model"
model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32, attn_implementation="eager")
quantize_(model.model.layers, Int8WeightOnlyConfig(granularity=PerRow()))
read = AutoTokenizer.from_pretrained(lm)
texts = sorted((data / "texts").glob("*.txt"))
tokens = [read(text.read_text("utf-8")).input_ids[: 200 * 65] for text in texts]
train, held_out = torch.tensor(tokens).reshape(len(texts), 200, 65).split([190, 10], dim=1)

method = fa.LoRA(rank=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
forward = fa.bind(model, method)  # pure: the model is shared, and never changed
generator = torch.Generator().manual_seed(0)
params = fa.stack([fa.init(method, model, generator=generator) for _ in texts])  # [5, ...]


def loss(params, rows):  # of one adapter
    logits = forward(params, rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


step = fa.value_and_grad(loss, in_dims=(0, 0))  # as vmap(torch.func.grad_and_value(loss))
optimizer = torchopt.adamw(lr=5e-3)
state = optimizer.init(params)
for _ in range(20):
    _, grads = step(params, train[:, torch.randint(190, (4,), generator=generator)])
    updates, state = optimizer.update(grads, state, params=params, inplace=False)
    params = torchopt.apply_updates(params, updates, inplace=False)

for text, adapter, rows in zip(texts, fa.unstack(params), held_out, strict=True):
    fa.save_peft(f"adapters/{text.stem}", adapter, method, model)  # PEFT loads it
    print(f"{text.stem:10} base {loss(None, rows):.2f}  adapted {loss(adapter, rows):.2f}")
