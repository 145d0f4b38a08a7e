"""The prompts of `fadapt generate`, by vLLM, from the same folders. Run by a Python that has vLLM:

    python serve_vllm.py MODEL PROMPTS.jsonl NAME=ADAPTER ... > lines.jsonl

As a server: vllm serve MODEL --enable-lora --max-lora-rank 16 --lora-modules NAME=ADAPTER ...
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":  # vLLM may start processes of its own
    model, prompts, *named = sys.argv[1:]
    folders = dict(word.split("=", 1) for word in named)
    lines = [json.loads(line) for line in Path(prompts).read_text("utf-8").splitlines() if line]
    adapters = {n: LoRARequest(n, k, f) for k, (n, f) in enumerate(folders.items(), 1)}
    llm = LLM(
        model,
        dtype="float32",
        enable_lora=True,
        # One more than there are: on a CPU, vLLM 0.32 puts the last place on the rows of the base.
        max_loras=len(adapters) + 1,
        max_lora_rank=16,  # at least the largest r, and one of the sizes that vLLM knows
        max_model_len=64,
        enforce_eager=True,
    )
    found = llm.generate(
        [line["prompt"] for line in lines],
        SamplingParams(temperature=0, max_tokens=7),
        lora_request=[adapters.get(line["adapter"]) for line in lines],  # None is the base
        use_tqdm=False,
    )
    for line, output in zip(lines, found, strict=True):
        print(json.dumps({**line, "tokens": list(output.outputs[0].token_ids)}))
