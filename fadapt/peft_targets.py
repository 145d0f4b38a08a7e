"""Which layers and modules a PEFT config means, by PEFT's own rules, and their spelling here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fadapt.errors import CheckpointError, TargetError, listing
from fadapt.targets import ALL_LINEAR, exact_pattern, find_targets


def check_targets(options: Mapping[str, Any], model: nn.Module, adapted: Sequence[str]) -> None:
    """Raise CheckpointError unless the config targets exactly the layers in the weights file."""
    targets = options["target_modules"]
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return  # PEFT chose by the model's architecture: the file holds what it chose.
    wanted = [p for p, _ in model.named_modules() if p and _is_target(p, options)]
    if missing := [p for p in wanted if p not in adapted]:
        raise CheckpointError(
            f"by adapter_config.json {len(wanted)} layers are adapted, but "
            f"adapter_model.safetensors lacks {listing(missing)}. The file is of another "
            "configuration, or was cut short."
        )
    if extra := [p for p in adapted if p not in wanted]:
        raise CheckpointError(
            f"adapter_model.safetensors holds parameters for {listing(extra)}, which "
            f"adapter_config.json does not target (target_modules={targets!r})."
        )


def _is_target(path: str, options: Mapping[str, Any]) -> bool:
    """PEFT's rule, ``check_target_module_exists`` in ``peft/tuners/tuners_utils.py``."""
    targets, exclude = options["target_modules"], options["exclude_modules"] or ()
    if _hit(path, exclude):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in options["modules_to_save"]):
        return False
    if isinstance(targets, str) or path in targets or not _hit(path, targets):
        return _hit(path, targets)
    blocks, lists = options["layers_to_transform"], options["layers_pattern"]
    if not blocks:
        return True
    prefixes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in lists] or [r".*?\.[^.]*\.(\d+)\."]
    found = [m for m in (re.match(p, path) for p in prefixes) if m]
    return bool(found) and int(found[0][1]) in blocks


def _hit(path: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == p or path.endswith(f".{p}") for p in patterns)


def spelt(
    options: Mapping[str, Any], model: nn.Module, adapted: Sequence[str], dropped: list[str]
) -> dict[str, Any]:
    """The fields that say which layers: as in the config where that passes the strict rules, else
    by exact paths."""
    names = [p for p, _ in model.named_modules()]
    targets, exclude = options["target_modules"], options["exclude_modules"] or ()
    for what, given in (("target_modules", targets or ()), ("exclude_modules", exclude)):
        patterns = [] if isinstance(given, str) else given
        dropped += [f"{what}: {p}" for p in patterns if not any(_hit(n, [p]) for n in names)]
    saved = [m for m in options["modules_to_save"] if any(_hit(n, [m]) for n in names)]
    wide = set(saved_by_peft(options["modules_to_save"], model))
    if wide != {n for n in names if _hit(n, saved)}:
        saved = sorted(wide)
    as_given: dict[str, Any] = {
        "targets": targets if isinstance(targets, str) else tuple(targets or ()),
        "exclude": exclude if isinstance(exclude, str) else tuple(exclude),
        "layers_to_transform": tuple(options["layers_to_transform"]),
        "layers_pattern": tuple(options["layers_pattern"]),
        "modules_to_save": tuple(saved),
    }
    try:
        if list(find_targets(model, *as_given.values())) == list(adapted):
            return as_given
    except TargetError:
        pass
    return {"targets": exact_pattern(adapted), "modules_to_save": tuple(saved)}


def saved_by_peft(names: Sequence[str], model: nn.Module) -> list[str]:
    """The modules that PEFT's ``modules_to_save`` stands for: any name with that ending, even in
    the middle of a word (``_set_trainable`` in ``peft/utils/other.py``)."""
    paths = [p for p, _ in model.named_modules(remove_duplicate=False)]
    return [p for p in paths if any(p.endswith(n) for n in names)]


def check_aliases(paths: Sequence[str], model: nn.Module) -> None:
    """Raise CheckpointError if one of the layers is held by the model under several names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for path in paths:
        held = names[id(model.get_submodule(path))]
        if len(held) > 1:
            raise CheckpointError(
                f"layer {path!r} is one module under {len(held)} names ({listing(held)}). PEFT "
                "adapts it under the first alone, fadapt under all: such an adapter cannot pass "
                "between them."
            )
