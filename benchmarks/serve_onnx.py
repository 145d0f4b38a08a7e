"""The prompts of `fadapt generate`, by ONNX Runtime: no torch, no transformers and no fadapt.

fadapt export --model MODEL --adapter NAME=DIR ... --kv-cache --out GRAPH.onnx
python serve_onnx.py GRAPH.onnx MODEL PROMPTS.jsonl > lines.jsonl
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file
from tokenizers import Tokenizer

NEW = 7  # tokens after each prompt


def generate(session, bank, ids, tokens, mask):
    """``[n, NEW]``: the likeliest tokens after ``tokens [n, longest]``, padded on the left; row i
    wears adapter ``ids[i]``, -1 for none."""
    # Of each layer's keys and values [batch, heads, past, size] nothing yet.
    kept = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    found = []
    for _ in range(NEW):
        places = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
        logits, *present = session.run(None, {"ids": ids, **given, **kept, **bank})
        kept = dict(zip(kept, present, strict=True))
        tokens = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(tokens)], 1)
        found.append(tokens)
    return np.concatenate(found, 1)


if __name__ == "__main__":
    graph, model, prompts = map(Path, sys.argv[1:])
    lines = [json.loads(line) for line in prompts.read_text("utf-8").splitlines() if line]
    known = json.loads(Path(f"{graph}.json").read_text("utf-8"))["ids"]  # {name: id}
    ids = np.array([known[line["adapter"]] for line in lines])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = [tokenizer.encode(line["prompt"]).ids for line in lines]
    longest = max(map(len, rows))
    tokens = np.array([[0] * (longest - len(row)) + row for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    session = onnxruntime.InferenceSession(graph)
    made = generate(session, load_file(f"{graph}.bank.safetensors"), ids, tokens, mask).tolist()
    end = json.loads((model / "config.json").read_text("utf-8"))["eos_token_id"]
    for line, row in zip(lines, made, strict=True):
        new = row[: row.index(end)] if end in row else row
        print(json.dumps({**line, "text": tokenizer.decode(new), "tokens": new}))
