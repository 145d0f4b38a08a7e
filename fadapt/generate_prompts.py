"""``fadapt generate``: continue the prompts of a file, each wearing the adapter that it names."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fadapt.bank import BASE_NAME
from fadapt.batching import bind_mixed
from fadapt.errors import ConfigError
from fadapt.generation import generate
from fadapt.models import SHIPPED, context_of, load_model, load_tokenizer, quiet
from fadapt.named_adapters import adapter_folders, load_bank
from fadapt.progress import progress_bar
from fadapt.prompts import Prompt, read_prompts
from fadapt.settings import BASES, COUNT, DTYPES, FINITE, POSITIVE, SEED, SHARE

# Options of transformers' generate: (flag, how it is parsed, what it is for, help).
_OPTIONS: tuple[tuple[str, Any, str | None, str], ...] = (
    ("temperature", POSITIVE, "do_sample", "the scores are divided by it"),
    ("top_k", COUNT, "do_sample", "draw from the k likeliest tokens"),
    ("top_p", SHARE, "do_sample", "draw from the likeliest tokens of this share in all"),
    ("length_penalty", FINITE, "num_beams", "above 0 favours long sequences, below 0 short ones"),
    ("repetition_penalty", POSITIVE, None, "scores of tokens that are there are divided by it"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt generate``."""
    parser.add_argument(
        "--model",
        type=Path,
        default=argparse.SUPPRESS,
        help="folder of a transformers causal LM (default: the one shipped)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        default=argparse.SUPPRESS,
        metavar="NAME=DIR",
        help="a PEFT folder and its name; as many as there are, of any rank, targets and method",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help='.jsonl of {"adapter": ..., "prompt": ...} or .tsv of adapter<TAB>prompt; the '
        "adapter 'base' is none",
    )
    parser.add_argument("--base", choices=BASES, default="dense", help="format of the weights")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=COUNT, default=8, help="prompts at once")
    parser.add_argument("--max-new-tokens", type=COUNT, default=64, help="after each prompt")
    parser.add_argument(
        "--do-sample", action="store_true", help="draw the tokens; else the likeliest is taken"
    )
    parser.add_argument("--num-beams", type=COUNT, default=1, help="search with so many beams")
    parser.add_argument("--num-return-sequences", type=COUNT, default=1, help="of each prompt")
    parser.add_argument(
        "--seed",
        type=SEED,
        default=argparse.SUPPRESS,
        help="of --do-sample; a prompt's tokens depend on it and on the prompt's place in the file "
        "(default: 0)",
    )
    for name, parse, use, text in _OPTIONS:
        what = "" if use is None else f", for --{use.replace('_', '-')}"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=parse,
            default=argparse.SUPPRESS,
            help=f"{text}{what} (default: as generation_config.json has it)",
        )


def run(arguments: argparse.Namespace) -> int:
    """Read, check, then generate batch by batch; each batch's lines are written as it ends."""
    from rich.console import Console

    options, folder = _options(arguments), getattr(arguments, "model", SHIPPED / "model")
    folders = adapter_folders(arguments.adapter)
    prompts = read_prompts(arguments.prompts, folders)
    tokenizer = load_tokenizer(folder)
    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    _check_lengths(prompts, rows, arguments.max_new_tokens, context_of(folder))
    model: Any = load_model(folder, arguments.base, arguments.dtype, arguments.device, length=None)
    bank = load_bank(model, folders)
    end = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id] if end is None else [end] if isinstance(end, int) else end
    pad = tokenizer.pad_token_id
    options |= {"eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
    mixed, seeds = bind_mixed(model, bank.method), _seeds(arguments, len(prompts))
    started, total = time.perf_counter(), 0
    with progress_bar(Console(stderr=True)) as bar:
        bar("generating", 0, len(prompts))
        for first in range(0, len(prompts), arguments.batch_size):
            batch = range(len(prompts))[first : first + arguments.batch_size]
            inputs = _padded([rows[i] for i in batch], options["pad_token_id"], model.device)
            names = [prompts[i].adapter for i in batch]
            drawn = None if seeds is None else [seeds[i] for i in batch]
            with quiet(), torch.no_grad():
                found = generate(mixed, bank, names, seed=drawn, **inputs, **options)
            new = found[:, inputs["input_ids"].shape[1] :].tolist()
            for k, tokens in enumerate(new):
                at, sequence = divmod(k, arguments.num_return_sequences)
                total += _tell(tokenizer, prompts[batch[at]], batch[at], sequence, tokens, ends)
            sys.stdout.flush()
            bar("generating", batch.stop, len(prompts))
    seconds = time.perf_counter() - started
    worn = len({p.adapter for p in prompts} - {BASE_NAME})
    print(
        f"{len(prompts)} prompts, {worn} adapters: {total} tokens in {seconds:.1f} s",
        file=sys.stderr,
    )
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What goes to transformers' generate; what does not fit together is refused."""
    given = vars(arguments)
    sample, beams, copies = given["do_sample"], given["num_beams"], given["num_return_sequences"]
    if sample and beams > 1:
        raise ConfigError("--do-sample with --num-beams: sample without beams, or search.")
    if not sample and copies > beams:
        raise ConfigError(
            f"--num-return-sequences {copies}: a search of {beams} "
            f"{'beams' if beams > 1 else 'beam'} has no more than that. Sample with --do-sample, "
            "or search with more --num-beams."
        )
    if "seed" in given and not sample:
        raise ConfigError("--seed is for --do-sample: nothing else is drawn.")
    on = {"do_sample": sample, "num_beams": beams > 1}
    for name, _, use, _ in _OPTIONS:
        if name in given and use is not None and not on[use]:
            flag, other = name.replace("_", "-"), use.replace("_", "-")
            raise ConfigError(f"--{flag} is for --{other}, which was not given.")
    options = {name: given[name] for name, _, _, _ in _OPTIONS if name in given}
    always = ("max_new_tokens", "do_sample", "num_beams", "num_return_sequences")
    return options | {name: given[name] for name in always}


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    with quiet():  # it warns of a text longer than the model's context, which is checked later
        tokens: list[int] = tokenizer(prompt.text)["input_ids"]
    if not tokens:
        raise ConfigError(f"{prompt.where}: the prompt has no token to go on from.")
    return tokens


def _check_lengths(
    prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], new: int, most: int | None
) -> None:
    for prompt, row in zip(prompts, rows, strict=True):
        if most is not None and len(row) + new > most:
            raise ConfigError(
                f"{prompt.where}: {len(row)} tokens and --max-new-tokens {new} are more than the "
                f"{most} that this model reads."
            )


def _seeds(arguments: argparse.Namespace, count: int) -> list[int] | None:
    """One for each prompt, whatever the batches."""
    if not arguments.do_sample:
        return None
    generator = torch.Generator().manual_seed(getattr(arguments, "seed", 0))
    return [int(torch.randint(0, 2**31, (), generator=generator)) for _ in range(count)]


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Any]:
    """``[n, longest]``, padded on the left, and the mask."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _tell(
    tokenizer: Any, prompt: Prompt, index: int, sequence: int, tokens: list[int], ends: list[int]
) -> int:
    """Write one line of JSON; returns how many tokens were made."""
    end = next((k for k, token in enumerate(tokens) if token in ends), None)
    kept = tokens[:end]
    line = {
        "index": index,
        "sequence": sequence,
        "adapter": prompt.adapter,
        "prompt": prompt.text,
        "text": tokenizer.decode(kept, skip_special_tokens=True),
        "tokens": kept,
        "finish_reason": "length" if end is None else "stop",
    }
    print(json.dumps(line))
    return len(tokens) if end is None else end + 1
