"""Which layers a method adapts: PEFT's rules, but strict.

The rules are those of ``peft/tuners/tuners_utils.py`` (``check_target_module_exists``): a string is
a regular expression that must match a layer's whole path; a list names paths, exactly or by their
last components; ``"all-linear"`` is every linear layer but the output embedding. Unlike there, a
pattern that matches nothing is an error that lists near misses.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from fadapt.bases import is_linear, is_supported
from fadapt.errors import ConfigError, TargetError, listing, near

ALL_LINEAR = "all-linear"
# Which biases a method trains beside its adapters.
BIASES = ("none", "all", "adapter_only")
V = TypeVar("V")


def find_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers_to_transform: Sequence[int] = (),
    layers_pattern: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
) -> dict[str, nn.Module]:
    """The layers to adapt, by path, in the model's order.

    Args:
        model: any module; itself a layer, its path is ``""``.
        targets: ``"all-linear"``, a regular expression for whole paths, or a list of paths and path
            endings.
        exclude: in the same spelling; wins over ``targets``.
        layers_to_transform: indices of blocks to keep; needs ``targets`` to be a list, whose whole
            paths are kept in any block.
        layers_pattern: names of the ``nn.ModuleList`` that the indices count in; any, if empty.
        modules_to_save: names of modules trained whole; nothing below them is a target.

    Returns:
        ``{path: module}``. A module that the model holds under several names is listed once, under
        the first.

    Raises:
        TargetError: a pattern, an index or an exclusion that matches nothing; a match that is not
            a layer with a base; a target inside another.
    """
    aliases = _aliases(model)
    names = [n for group in aliases.values() for n in group]
    chosen = _match(model, targets, aliases, "targets")
    dropped: set[str] = set()
    if exclude:
        dropped = _match(model, exclude, aliases, "exclude")
    saved = {n for m in modules_to_save for n in match_list([m], names, "modules_to_save")}
    if layers_to_transform:
        if isinstance(targets, str):
            raise TargetError(
                "layers_to_transform counts blocks for a list of targets; with the string "
                f"{targets!r}, write the block numbers into the regular expression."
            )
        chosen = _in_blocks(chosen, set(targets), layers_to_transform, layers_pattern)

    found: dict[str, nn.Module] = {}
    for module, group in aliases.items():
        below_saved = any(n == s or n.startswith(s + ".") for n in group for s in saved)
        if chosen & set(group) and not dropped & set(group) and not below_saved:
            found[group[0]] = module
    if not found:
        raise TargetError(
            f"targets={targets!r} matches {len(chosen)} layers, and all of them are excluded by "
            f"exclude={exclude!r} or modules_to_save={list(modules_to_save)!r}."
        )
    _check_layers(found, targets)
    _check_nesting(found)
    return found


def match_list(patterns: Iterable[str], names: Sequence[str], what: str) -> set[str]:
    """The names that equal a pattern or end in ``.pattern``; each pattern must match one."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if n == pattern or n.endswith(f".{pattern}")}
        if not hits:
            raise TargetError(
                f"{what}: {pattern!r} matches no module of the model. A name in a list is a whole "
                f"path or its last components.{near(pattern, names)}"
            )
        found |= hits
    return found


def pattern_values(patterns: Mapping[str, V], paths: Iterable[str], what: str) -> dict[str, V]:
    """For each path the value of the first key that matches it, by PEFT's ``get_pattern_key``: a
    regular expression for the path's last components.

    Raises:
        TargetError: a key matches no path.
    """
    paths = list(paths)
    values: dict[str, V] = {}
    for key, value in patterns.items():
        expression = _compile(rf"(?:.*\.)?(?:{key})", what, key)
        hits = [p for p in paths if expression.fullmatch(p)]
        if not hits:
            raise TargetError(
                f"{what}: {key!r} matches none of the {len(paths)} adapted layers. A key is a "
                f"regular expression for the end of a path.{near(key, paths)}"
            )
        for path in hits:
            values.setdefault(path, value)
    return values


def normalize_targets(method: Any) -> None:
    """Bring the fields of a new method that choose layers to tuples: it is hashed, and frozen.

    Raises:
        ConfigError: an unknown ``bias``.
    """
    if method.bias not in BIASES:
        raise ConfigError(f"bias must be one of {', '.join(BIASES)}; got {method.bias!r}.")
    for name in ("targets", "exclude"):
        if not isinstance(value := getattr(method, name), str):
            object.__setattr__(method, name, tuple(value))
    for name in ("layers_to_transform", "layers_pattern", "modules_to_save"):
        value = getattr(method, name)
        one = isinstance(value, int | str)
        object.__setattr__(method, name, (value,) if one else tuple(value))


def exact_pattern(paths: Iterable[str]) -> str:
    """A regular expression that matches these paths and no other."""
    return "|".join(re.escape(p) for p in paths)


def _aliases(model: nn.Module) -> dict[nn.Module, list[str]]:
    groups: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        groups.setdefault(module, []).append(name)
    return groups


def _match(
    model: nn.Module, patterns: str | Sequence[str], aliases: Mapping[Any, list[str]], what: str
) -> set[str]:
    names = [n for group in aliases.values() for n in group]
    if not isinstance(patterns, str):
        if not patterns:
            raise TargetError(f"{what} is an empty list: name at least one layer.")
        return match_list(patterns, names, what)
    if patterns.lower() == ALL_LINEAR and what == "targets":
        return _all_linear(model, aliases)
    expression = _compile(patterns, what, patterns)
    hits = {n for n in names if expression.fullmatch(n)}
    if not hits:
        hint = ""
        if any(n.endswith(f".{patterns}") for n in names):
            hint = f" Some paths end in it: write [{patterns!r}] for a list of path endings."
        raise TargetError(
            f"{what}: the regular expression {patterns!r} matches no module's whole path."
            f"{hint}{near(patterns, names)}"
        )
    return hits


def _all_linear(model: nn.Module, aliases: Mapping[Any, list[str]]) -> set[str]:
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    names = {
        name
        for module, group in aliases.items()
        if is_linear(module) and module is not output
        for name in group
    }
    if not names:
        raise TargetError(
            f"targets='all-linear' finds no linear layer in this {type(model).__name__}."
        )
    return names


def _in_blocks(
    names: set[str], whole: set[str], wanted: Sequence[int], lists: Sequence[str]
) -> set[str]:
    """The names that lie in a wanted block, and those that were given as whole paths."""
    prefixes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in lists] or [r".*?\.[^.]*\.(\d+)\."]
    block: dict[str, int] = {}
    for name in names:
        for prefix in prefixes:
            if match := re.match(prefix, name):
                block[name] = int(match[1])
                break
    missing = sorted(set(wanted) - set(block.values()))
    if missing:
        raise TargetError(
            f"layers_to_transform: no target lies in block {missing}; blocks with targets: "
            f"{sorted(set(block.values()))} (layers_pattern={list(lists)!r})."
        )
    return (names & whole) | {n for n, b in block.items() if b in set(wanted)}


def _check_layers(found: Mapping[str, nn.Module], targets: object) -> None:
    wrong = [f"{p} ({type(m).__name__})" for p, m in found.items() if not is_supported(m)]
    if wrong:
        raise TargetError(
            f"targets={targets!r} also matches modules that are not linear layers: "
            f"{listing(wrong)} (nor embeddings or convolutions). Narrow the pattern, or exclude "
            "them."
        )


def _check_nesting(found: Mapping[str, nn.Module]) -> None:
    inside = {id(child): path for path, m in found.items() for child in list(m.modules())[1:]}
    for path, module in found.items():
        if id(module) in inside:
            raise TargetError(
                f"target {path!r} lies inside target {inside[id(module)]!r}: adapt one of them, "
                "and exclude the other."
            )


def _compile(expression: str, what: str, given: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise TargetError(f"{what}: {given!r} is not a regular expression: {error}.") from error
