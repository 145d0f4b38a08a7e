"""The settings of ``fadapt sweep`` and ``fadapt train``: one dataclass is the flags, the keys of a
configuration file, and what a resumed run must have in common with the one that was stopped.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fadapt.errors import CheckpointError, ConfigError, near

Parse = Callable[[str], Any]


def _number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Parse:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low <= value < high) or (open_low and value == low):
            bound = f"over {low:g}" if open_low else f"of at least {low:g}"
            bound += "" if high == float("inf") else f" and under {high:g}"
            bound = "that is finite" if low == float("-inf") else bound
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {name} {bound}, got {text!r}")
        return value

    return parse


COUNT, SEED = _number(int, 1), _number(int, 0, 2**63)  # torch.Generator takes no larger seed
POSITIVE, NOT_NEGATIVE = _number(float, 0, open_low=True), _number(float, 0)
SHARE = _number(float, 0, 1)
FINITE = _number(float, float("-inf"), open_low=True)
BASES = (
    "int8",
    "float8",
    "aqlm",
    "inc-fp8",
    "dense",
)  # fadapt.models.QUANTIZERS has one entry for each
METHODS = ("lora", "rslora", "dora", "oft")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _setting(default: Any, parse: Parse, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"parse": parse, "help": text, **metadata})


@dataclass(frozen=True)
class Settings:
    """What a run is made from. A field that is a tuple is an axis of the grid of trials."""

    model: str | None = _setting(None, str, "folder of a causal LM (default: the one shipped)")
    data: str | None = _setting(
        None,
        str,
        "a .txt or .jsonl file, or a folder of them: each file has adapters of its own "
        "(default: the texts shipped)",
    )
    base: str = _setting("int8", str, "format of the frozen weights", choices=BASES)
    dtype: str = _setting(
        "auto",
        str,
        "of activations: auto is bfloat16 on a GPU and float32 on a CPU",
        choices=DTYPES,
    )
    method: str = _setting("lora", str, "how an adapter changes a layer", choices=METHODS)
    lr: tuple[float, ...] = _setting((2e-3, 6e-3), POSITIVE, "learning rate")
    rank: tuple[int, ...] = _setting((8, 16), COUNT, "rank")
    alpha: tuple[float, ...] = _setting(
        (16.0,), POSITIVE, "the update is scaled by alpha / rank, rslora's by alpha / sqrt(rank)"
    )
    targets: tuple[str, ...] = _setting(
        ("all-linear",), str, "all-linear, names as q_proj,v_proj, or a regular expression"
    )
    block_size: int = _setting(32, COUNT, "of OFT's rotations, in place of rank and alpha")
    seed: tuple[int, ...] = _setting((0,), SEED, "of the first weights and the order of the text")
    steps: int = _setting(300, COUNT, "optimiser steps")
    epochs: float | None = _setting(
        None, POSITIVE, "passes over the largest file, in place of --steps"
    )
    batch: int = _setting(2, COUNT, "windows a step and adapter")
    length: int = _setting(64, COUNT, "tokens a window")
    dropout: float | None = _setting(
        None, SHARE, "of the adapter's input (default: 0, with --from the adapter's own)"
    )
    decay: float = _setting(0.0, NOT_NEGATIVE, "AdamW's weight decay")
    clip: float = _setting(1.0, POSITIVE, "largest norm of an adapter's gradient")
    warmup: float = _setting(0.05, SHARE, "share of the steps in which the learning rate rises")
    eval_every: int = _setting(50, COUNT, "steps between two looks at the held-out text")
    save_every: int = _setting(50, COUNT, "steps between two writes of the state", own=True)
    device: str = _setting("cpu", str, "cpu, cuda, cuda:1, ...")
    out: str | None = _setting(
        None, str, "folder to write to (default: the next of runs/sweep-1, -2, ...)", own=True
    )
    start: str | None = _setting(
        None, str, "PEFT folder to go on training from", flag="from", train=True
    )
    resume: bool = _setting(
        False, bool, "go on with the run in --out (default: the last one)", own=True
    )


def add_settings(parser: argparse.ArgumentParser, one: bool = False) -> None:
    """A flag for each field, and ``--config``. What is not given stays out of the namespace.

    Args:
        parser: gains the flags.
        one: whether an axis of the grid takes a single value.
    """
    for item in fields(Settings):
        default: Any = item.default
        meta = item.metadata
        if meta.get("train") and not one:
            continue
        flag, text = f"--{flag_of(item)}", meta["help"]
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        many = isinstance(default, tuple)
        if default is not None:
            shown = default[:1] if one and many else default
            text += f" (default: {' '.join(map(str, shown)) if many else default})"
        parser.add_argument(
            flag,
            dest=item.name,
            type=meta["parse"],
            nargs="+" if many and not one else None,
            choices=meta.get("choices"),
            default=argparse.SUPPRESS,
            help=text + (", one trial each" if many and not one else ""),
            metavar=None if "choices" in meta else flag_of(item).upper(),
        )
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="JSON or YAML whose keys are these flags; a flag given here wins",
    )


def flag_of(item: Any) -> str:
    """How a field is spelled on the command line, without dashes."""
    return str(item.metadata.get("flag", item.name.replace("_", "-")))


def given_settings(arguments: argparse.Namespace, one: bool = False) -> dict[str, Any]:
    """What the caller chose: the configuration file's values, and the flags over them.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown key or a wrong value.
    """
    flags = {k: v for k, v in vars(arguments).items() if k != "config"}
    values = read_config(Path(arguments.config), one) if "config" in arguments else {}
    values |= {k: _as_axis(k, v) for k, v in flags.items()}
    if values.get("method") == "oft" and {"rank", "alpha"} & values.keys():
        raise ConfigError("--method oft has a --block-size, no rank and no alpha.")
    if values.get("method", "lora") != "oft" and "block_size" in values:
        raise ConfigError("--block-size is for --method oft.")
    if "steps" in values and "epochs" in values:
        raise ConfigError("steps and epochs were both given: they set the same thing.")
    return values


def read_config(path: Path, one: bool = False) -> dict[str, Any]:
    """The settings of a JSON or YAML file, each parsed as its flag would be."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from error
    except ValueError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of settings, got {content!r}.")
    known = {flag_of(f): f for f in fields(Settings) if one or not f.metadata.get("train")}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise ConfigError(f"--config {path}: unknown setting {key!r}.{near(name, known)}")
        values[known[name].name] = _parse(known[name], value, f"--config {path}: {key}", one)
    return values


def _parse(item: Any, value: Any, where: str, one: bool) -> Any:
    if isinstance(item.default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: expected true or false, got {value!r}.")
        return value
    many = isinstance(item.default, tuple)
    parts = value if isinstance(value, list) else [value]
    if len(parts) != 1 and (one or not many):
        raise ConfigError(f"{where}: expected one value, got {value!r}.")
    try:
        # As text: YAML 1.1 reads 1e-3 as a string, JSON as a number.
        found = tuple(item.metadata["parse"](str(part)) for part in parts)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}.") from None
    choices = item.metadata.get("choices", found)
    if any(part not in choices for part in found):
        raise ConfigError(f"{where}: expected one of {', '.join(choices)}; got {value!r}.")
    return found if many else found[0]


def _as_axis(name: str, value: Any) -> Any:
    item = Settings.__dataclass_fields__.get(name)
    if item is None or not isinstance(item.default, tuple):
        return value
    # The same value twice would be the same trial twice.
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else (value,)


def to_json(settings: Settings) -> dict[str, Any]:
    """What a state keeps of the settings: all that bears on the numbers."""
    kept = {f.name for f in fields(Settings) if not f.metadata.get("own")}
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items() if k in kept
    }


def from_saved(saved: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Settings:
    """The settings of a stopped run, with what may differ taken from ``given``.

    Raises:
        ConfigError: ``given`` differs from what the run was made with.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    own = {f.name for f in fields(Settings) if f.metadata.get("own")}
    known = {f.name: flag_of(f) for f in fields(Settings)}
    if not values.keys() <= known.keys():
        raise CheckpointError(f"--resume: {where} was written by another version of fadapt.")
    odd = [k for k, v in given.items() if k not in own and v != values.get(k)]
    if odd:
        told = "; ".join(
            f"{known[k]}: made with {_show(values.get(k))}, now {_show(given[k])}" for k in odd
        )
        raise ConfigError(
            f"--resume: the run in {where} has other settings ({told}). Leave them out to go on "
            "with it, or start another run with another --out."
        )
    return Settings(**values | {k: v for k, v in given.items() if k in own})


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def of_one(settings: Settings, axes: Iterable[str] | None = None) -> Settings:
    """The same with only the first value of these axes, or of all."""
    values = vars(settings).items()
    first: dict[str, Any] = {
        k: v[:1] for k, v in values if isinstance(v, tuple) and (axes is None or k in axes)
    }
    return replace(settings, **first)


def of_many(given: Mapping[str, Any]) -> Settings:
    """The settings of a sweep.

    Raises:
        ConfigError: the adapters would differ in what this method's stacks cannot.
    """
    settings = Settings(**given)
    if settings.method in ("lora", "rslora"):
        return settings
    ragged = ("rank", "alpha", "targets")  # padding and scaling as data are for LoRA alone
    odd = [k for k in ragged if len(given.get(k, ())) > 1]
    if odd:
        raise ConfigError(
            f"--{odd[0]} {_show(given[odd[0]])}: adapters of --method {settings.method} that "
            "train at once may differ in text, learning rate and seed alone."
        )
    return of_one(settings, ragged)
