"""What each way of merging keeps of an adapter, on the small language model that ships with fadapt.

    python benchmarks/merge_table.py [--bases int8 inc-fp8 aqlm] [--text html] [--steps 100]

A LoRA adapter is trained on each quantized base, on nine tenths of a text; second moments for the
roundings that take them come from a part of those. On the last tenth, per row of the table:

loss           a token, of the whole model
survives       the share of the adapter's change that is in the layers' outputs, mean over layers
error          of the layers' outputs, against the base with the adapter beside it
float error    the same, against the weights before quantization, with the adapter

"dropped" is the base alone, so its float error is that of the base and of the lost adapter; the
float error of "beside" is the base's own. "a tenth of the adapter" repeats the grids' rows for an
update that is mostly below half a step. The same seeds and threads give the same numbers, but for
the seconds.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from timing import machine
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import fadapt as fa
from fadapt import training
from fadapt.corpus import IGNORED, Corpus, read_corpus, rows_at
from fadapt.measure import shares
from fadapt.models import SHIPPED, load_model, load_tokenizer, quiet
from fadapt.progress import progress_bar

FOLDER = SHIPPED / "model"
LENGTH, BATCH, RATE = 64, 4, 1e-3
BEAM, TUNING = 4, 48  # of the search for codes; batches of 8 windows, each met once
METHOD = fa.LoRA(rank=8, alpha=16)
NAMES = ("loss", "survives", "error", "float error", "seconds")


class Case(NamedTuple):
    """One base, the adapter on it, and what the rows are measured by."""

    model: nn.Module
    params: Any
    floats: dict[str, Tensor]  # the weights before quantization
    moments: dict[str, Tensor]  # of training inputs
    held: dict[str, Tensor]  # of held-out inputs
    text: Corpus


class Result(NamedTuple):
    """A merged model: its forward, and the weight that each layer multiplies by."""

    forward: Callable[..., Any]
    weights: dict[str, Tensor]


def text_of(name: str) -> Corpus:
    tokenizer = load_tokenizer(FOLDER)

    def encode(text: str) -> list[int]:
        with quiet():
            return tokenizer(text, add_special_tokens=False)["input_ids"]

    return read_corpus(SHIPPED / "texts" / f"{name}.txt", encode, tokenizer.eos_token_id, LENGTH)


def train(model: nn.Module, text: Corpus, steps: int) -> Any:
    forward = fa.bind(model, METHOD)
    params = fa.init(METHOD, model, generator=torch.Generator().manual_seed(0))
    params = tree_map(lambda t: t.requires_grad_(), params)
    leaves, _ = tree_flatten(params)
    optimizer = torch.optim.AdamW(leaves, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * training.schedule(step, steps, 0.05)
        windows = text.train[rows_at(0, step, BATCH, len(text.train))]
        loss, count = training.token_losses(forward, params, None, windows)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tree_map(lambda t: t.detach(), params)


def batches(windows: Tensor, count: int) -> list[dict[str, Any]]:
    kept = windows[(windows != IGNORED).all(1)][: count * 8, :-1]
    return [{"input_ids": w, "use_cache": False} for w in kept.split(8)]


def weights_of(model: nn.Module, paths: Any) -> dict[str, Tensor]:
    return {p: fa.base_of(model.get_submodule(p)).dequantize(torch.float32) for p in paths}


def case_of(base: str, text: Corpus, steps: int, dense: nn.Module) -> Case:
    model = load_model(FOLDER, base, length=LENGTH)
    params = train(model, text, steps)
    moments = fa.calibrate(model, params, METHOD, batches(text.train, 16))
    held = fa.calibrate(model, params, METHOD, batches(text.held, 8))
    return Case(model, params, weights_of(dense, params), moments, held, text)


def alone(model: nn.Module) -> Callable[..., Any]:
    forward = fa.bind(model, METHOD)
    return lambda **inputs: forward(None, **inputs)


def whole(case: Case, **options: Any) -> Result:
    merged = fa.merged_model(case.model, case.params, METHOD, **options)
    return Result(alone(merged), weights_of(merged, case.params))


def hybrid(case: Case, rank: int, **options: Any) -> Result:
    state, rest, kind = fa.merge_with_remainder(
        case.model, case.params, METHOD, rank, moments=case.moments, **options
    )
    merged = fa.bind(case.model, kind, state=state)
    weights = {
        path: layer.base.dequantize(torch.float32) + rest[path].lora_B @ rest[path].lora_A
        for path, layer in merged.layers.items()
    }
    return Result(lambda **inputs: merged(rest, **inputs), weights)


def beside(case: Case) -> Result:
    forward, at = fa.bind(case.model, METHOD), METHOD.at(list(case.params))
    weights = {
        path: at[path].merge(w, case.params[path])
        for path, w in weights_of(case.model, case.params).items()
    }
    return Result(lambda **inputs: forward(case.params, **inputs), weights)


def on_grids(case: Case) -> dict[str, Callable[[], Result]]:
    """The roundings of a format with a grid."""
    g = torch.Generator().manual_seed(0)
    m = case.moments
    return {
        "nearest": lambda: whole(case),
        "nearest, fresh scales": lambda: whole(case, scales="fresh"),
        "search": lambda: whole(case, rounding="search"),
        "search, weighted": lambda: whole(case, rounding="search", moments=m),
        "feedback (GPTQ)": lambda: whole(case, rounding="feedback", moments=m),
        "stochastic": lambda: whole(case, rounding="stochastic", generator=g),
        "nearest + remainder of rank 2": lambda: hybrid(case, 2),
    }


def on_aqlm(case: Case, bar: Any) -> dict[str, Callable[[], Result]]:
    """The ways into codes."""
    m, done = case.moments, {}
    teacher = fa.bind(case.model, METHOD)

    def recode(rounds: int = 3, **options: Any) -> fa.Recode:
        return fa.Recode(beam=BEAM, rounds=rounds, progress=bar, **options)

    def kept(name: str, **options: Any) -> Result:
        done[name] = fa.merged_model(case.model, case.params, METHOD, moments=m, **options)
        return Result(alone(done[name]), weights_of(done[name], case.params))

    def tuned(name: str) -> Result:
        merged = fa.finetune_aqlm(
            done[name],
            lambda **inputs: teacher(case.params, **inputs),
            batches(case.text.train, TUNING),
            steps=TUNING,
            progress=bar,
        )
        return Result(alone(merged), weights_of(merged, case.params))

    return {
        "codes alone": lambda: whole(case, aqlm=recode(0)),
        "codebooks and scales, in W": lambda: whole(case, aqlm=recode()),
        "  in outputs": lambda: kept("outputs", aqlm=recode()),
        "  in outputs, fine-tuned": lambda: tuned("outputs"),
        "  from the float weight": lambda: kept("float", aqlm=recode(original=case.floats)),
        "  from it, fine-tuned": lambda: tuned("float"),
        "old codes + remainder of rank 2": lambda: hybrid(case, 2),
        "old codes + remainder of rank 4": lambda: hybrid(case, 4),
        "into int8": lambda: whole(case, to="int8"),
    }


def row(case: Case, result: Result, target: dict[str, Tensor]) -> list[float]:
    """Loss, share, error, float error."""

    def forward(params: Any, **inputs: Any) -> Any:
        return result.forward(**inputs)

    loss = float(training.evaluate_base(forward, [case.text.held], 16)[0])
    old, at = weights_of(case.model, case.params), METHOD.at(list(case.params))
    kept, errors, float_errors = [], [], []
    for path, new in result.weights.items():
        found = shares([(old[path], target[path], new)], case.held[path])
        exact = at[path].merge(case.floats[path], case.params[path])
        kept.append(found.captured)
        errors.append(found.error)
        float_errors.append(shares([(old[path], exact, new)], case.held[path]).error)
    return [loss, *(sum(v) / len(v) for v in (kept, errors, float_errors))]


def show(case: Case, ways: dict[str, Callable[[], Result]]) -> None:
    target = beside(case).weights
    first = {
        "adapter beside": lambda: beside(case),
        "adapter dropped": lambda: Result(alone(case.model), weights_of(case.model, case.params)),
    }
    print(f"{'':34}" + "".join(f"{name:>13}" for name in NAMES))
    for name, make in (first | ways).items():
        start = time.perf_counter()
        result = make()
        seconds = time.perf_counter() - start
        loss, kept, error, floats = row(case, result, target)
        cells = f"{loss:>13.4f}{kept:>13.1%}{error:>13.3%}{floats:>13.3%}"
        print(f"{name:34}{cells}{seconds:>13.1f}", flush=True)


def sizes(case: Case) -> str:
    found = [
        (METHOD.at(list(case.params))[p].merge(w, case.params[p]) - w).norm() / w.norm()
        for p, w in weights_of(case.model, case.params).items()
    ]
    return f"|ΔW| / |W| {sum(found) / len(found):.2%}, mean of {len(found)} layers"


def tables(bases: list[str], text: str, steps: int) -> None:
    """Print the table of each base."""
    corpus, dense = text_of(text), load_model(FOLDER, "dense", length=LENGTH)
    for base in bases:
        case = case_of(base, corpus, steps, dense)
        print(
            f"\n{base}, a LoRA of rank {METHOD.rank} after {steps} steps on {text!r}, {sizes(case)}"
        )
        if base == "aqlm":
            with progress_bar(Console(stderr=True)) as bar:
                show(case, on_aqlm(case, bar))
            continue
        show(case, on_grids(case))
        small = {p: leaf._replace(lora_B=leaf.lora_B / 10) for p, leaf in case.params.items()}
        case = case._replace(params=small)
        print(f"{base}, a tenth of the adapter, {sizes(case)}")
        show(case, on_grids(case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", default=["int8", "inc-fp8", "aqlm"])
    parser.add_argument("--text", default="html", help="one of fadapt/data/texts")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("cpu"))
    tables(args.bases, args.text, args.steps)


if __name__ == "__main__":
    main()
