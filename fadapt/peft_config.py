"""``adapter_config.json`` and a method: what each option means, for every method alike.

Read from ``peft/config.py``, ``tuners/tuners_utils.py`` and the methods' ``config.py`` of PEFT
0.21. A method's own options are in its own file (``peft_lora.py``), which gives a :class:`Format`.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fadapt.errors import CheckpointError, ConfigError, TargetError, listing, near
from fadapt.method import Method
from fadapt.peft_targets import check_targets, spelt
from fadapt.targets import ALL_LINEAR, exact_pattern, pattern_values

# PEFT's name for a method -> the module that holds its FORMAT. DoRA is LoRA with use_dora to PEFT,
# a method of its own here.
_MODULES = {
    "LORA": "fadapt.peft_lora",
    "LORA with use_dora": "fadapt.peft_dora",
    "OFT": "fadapt.peft_oft",
    "FADAPT_OFT": "fadapt.peft_oft_own",
}

# Options that say where an adapter comes from, or how PEFT keeps it in memory: no number in them.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "merge_weights",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Options that all methods share. ``fan_in_fan_out`` follows from the layer's class, there as here.
_SHARED = {
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "fan_in_fan_out": False,
}


class Format(NamedTuple):
    """How PEFT writes one method.

    Attributes:
        peft_type: PEFT's name for it.
        method: the class of methods that it stands for.
        options: PEFT's options of this method that are read and written, with PEFT's defaults.
        inert: options that change no output of a trained adapter.
        off: ``{option: its value when it is off}``; any other value is refused.
        suffixes: endings of this method's keys, as ``.lora_A.weight``.
        read: ``(options, fields that all methods share) -> method``.
        write: ``(method, paths) -> options``.
        unpack: ``(tensors by suffix, the method at the layer) -> that layer's parameters``; raises
            KeyError with a suffix that is missing.
        pack: ``(one layer's parameters) -> tensors by suffix``.
        convert: ``(params, method, model) -> (params, method)``, where what is on disk is not yet
            relative to the model's own weights.
        fits: ``(base, path)``: raise CheckpointError if PEFT adapts such a layer otherwise.
        holds: whether PEFT has a way to say what this method of the class does.
    """

    peft_type: str
    method: type
    options: Mapping[str, Any]
    inert: frozenset[str]
    off: Mapping[str, Any]
    suffixes: Sequence[str]
    read: Callable[[Mapping[str, Any], dict[str, Any]], Any]
    write: Callable[[Any, Sequence[str]], dict[str, Any]]
    unpack: Callable[[Mapping[str, Tensor], Any], Any]
    pack: Callable[[Any], dict[str, Tensor]]
    convert: Callable[[dict[str, Any], Any, nn.Module], tuple[dict[str, Any], Any]] = (
        lambda params, method, model: (params, method)
    )
    fits: Callable[[Any, str], None] = lambda base, path: None
    holds: Callable[[Any], bool] = lambda method: True


def format_named(config: Mapping[str, Any]) -> Format:
    """The format of a config, by its ``peft_type``."""
    peft_type = config.get("peft_type")
    if config.get("use_dora"):
        peft_type = f"{peft_type} with use_dora"
    if not isinstance(peft_type, str) or peft_type not in _MODULES:
        raise CheckpointError(
            f"adapter_config.json: peft_type is {peft_type!r}; fadapt reads "
            f"{', '.join(sorted(_MODULES))}.{near(str(peft_type), _MODULES)}"
        )
    return _format(str(peft_type))


def format_of(method: Method) -> Format:
    """The format that a method is written in."""
    for name in _MODULES:
        found = _format(name)
        if type(method) is found.method and found.holds(method):
            return found
    stacked = hasattr(method, "members")
    hint = " Save the adapters of a stack one by one: fadapt.unstack(stack, unit)."
    raise CheckpointError(
        f"PEFT has no format for a {type(method).__name__}.{hint if stacked else ''}"
    )


def _format(name: str) -> Format:
    found: Format = import_module(_MODULES[name]).FORMAT
    return found


def read_config(
    config: Mapping[str, Any],
    fmt: Format,
    model: nn.Module,
    adapted: Sequence[str],
    dtype: torch.dtype | None,
) -> Any:
    """The method that a config describes.

    PEFT skips in silence what matches nothing in the model. Here too, for no output depends on it,
    but with a warning; the method is then spelt so that it passes fadapt's strict rules.

    Args:
        config: the file's content.
        fmt: its format.
        model: what the adapter is for.
        adapted: the paths of the layers that the weights file holds parameters for.
        dtype: of the parameters; None for float32.

    Raises:
        CheckpointError: an option that fadapt does not know or does not support; the config's
            targets are not the layers that the file holds.
    """
    options = _checked(config, fmt)
    bias = str(options["bias"])
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise CheckpointError(
            f"adapter_config.json: bias={bias!r} is none of 'none', 'all' and 'lora_only' (or "
            "'oft_only')."
        )
    for name in ("layers_to_transform", "layers_pattern", "modules_to_save"):
        options[name] = _listed(options[name], name)
    for name in ("target_modules", "exclude_modules"):
        if not isinstance(options[name], str | None):
            options[name] = _listed(options[name], name)
    try:
        check_targets(options, model, adapted)
    except re.error as error:
        raise CheckpointError(f"adapter_config.json: not a regular expression: {error}.") from error
    dropped: list[str] = []
    shared = spelt(options, model, adapted, dropped)
    for name in {"rank_pattern", "alpha_pattern"} & options.keys():
        living = {}
        for key, value in (options[name] or {}).items():
            try:
                pattern_values({key: value}, adapted, name)
                living[key] = value
            except TargetError:
                dropped.append(f"{name}: {key}")
        options[name] = living
    if dropped:
        warnings.warn(
            f"adapter_config.json: {listing(sorted(dropped))} match nothing in this model. PEFT "
            "skips them in silence; no output depends on them.",
            stacklevel=3,
        )
    try:
        shared |= {"dtype": dtype, "bias": "adapter_only" if bias.endswith("_only") else bias}
        return fmt.read(options, shared)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"adapter_config.json: {error}") from error


def write_config(
    fmt: Format, method: Any, paths: Sequence[str], saved: Sequence[str], model: nn.Module | None
) -> dict[str, Any]:
    """The content of ``adapter_config.json``, of plain JSON types.

    Args:
        fmt: the method's format.
        method: the hyperparameters.
        paths: the adapted layers.
        saved: the modules that are saved whole.
        model: where the base's name and the layers' classes are read, if given.
    """
    targets = method.targets
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        # PEFT knows this word for transformers' models alone, and writes what it found, as here.
        ambiguous = any(a.endswith(f".{b}") for a in paths for b in paths)
        targets = exact_pattern(paths) if ambiguous else list(paths)
    config = {
        "peft_type": fmt.peft_type,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **fmt.off,
        **fmt.options,
        **fmt.write(method, paths),
        "target_modules": _plain(targets),
        "exclude_modules": _plain(method.exclude) or None,
        "layers_to_transform": list(method.layers_to_transform) or None,
        "layers_pattern": list(method.layers_pattern) or None,
        "bias": method.bias.replace("adapter", fmt.peft_type.lower()),
        # Whole paths: PEFT takes any name that ends in one of these, even in mid-word.
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": False,
    }
    if model is not None:
        kind = type(model)
        config["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
        config["auto_mapping"] = {
            "base_model_class": kind.__name__,
            "parent_library": kind.__module__,
        }
        config["fan_in_fan_out"] = any(
            type(model.get_submodule(p)).__name__ == "Conv1D" for p in paths
        )
    return config


def _checked(config: Mapping[str, Any], fmt: Format) -> dict[str, Any]:
    """The options that are read, defaults filled in; the others are refused or known to be inert.

    ``null`` is PEFT's spelling of "not set" for an option of any type.
    """
    known = _SHARED | dict(fmt.options)
    name = "adapter_config.json"
    for key, value in config.items():
        if key in known or key in _INERT or key in fmt.inert or value is None:
            continue
        if key not in fmt.off:
            every = {*known, *fmt.off, *fmt.inert, *_INERT}
            raise CheckpointError(
                f"{name}: {key}={value!r} is an option that fadapt does not know, and so cannot "
                f"tell whether it changes the outputs.{near(key, every)}"
            )
        if value != fmt.off[key]:  # nor {}: to PEFT it is a variant with its defaults
            raise CheckpointError(
                f"{name}: {key}={value!r} changes the outputs, and fadapt does not support it "
                f"(only {fmt.off[key]!r})."
            )
    options = {k: config[k] if config.get(k) is not None else v for k, v in known.items()}
    for key, default in known.items():
        value, kind = options[key], dict if isinstance(default, dict) else int | float
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if (is_number or kind is dict) and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(
                f"{name}: {key}={value!r} must be {'a number' if is_number else 'an object'}."
            )
    return options


def _listed(value: Any, name: str) -> list[Any]:
    kind = int if name == "layers_to_transform" else str
    if value is None or value == "":
        return []
    if isinstance(value, kind):
        return [value]
    if not (isinstance(value, list) and all(isinstance(v, kind) for v in value)):
        raise CheckpointError(
            f"adapter_config.json: {name}={value!r} must be a list of {kind.__name__}."
        )
    return value


def _plain(patterns: str | Sequence[str]) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)
