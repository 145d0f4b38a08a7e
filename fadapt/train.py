"""``fadapt train``: train one adapter, a fresh one or one from a PEFT folder.

It is a sweep of one trial, without the comparison.
"""

import argparse
from pathlib import Path
from typing import Any

from fadapt.errors import ConfigError
from fadapt.peft import load_peft
from fadapt.settings import Settings, add_settings, given_settings, of_one
from fadapt.sweep import go, place, stopped

SHIPPED_TEXT = str(Path(__file__).parent / "data" / "texts" / "python.txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt train``."""
    add_settings(parser, one=True)


def run(arguments: argparse.Namespace) -> int:
    """Train the adapter; returns the exit code."""
    given = given_settings(arguments, one=True)
    out = place(given, "train")
    if given.get("resume"):
        settings = stopped(given, out)
    else:
        settings = of_one(Settings(**{"data": SHIPPED_TEXT} | given))
        _check(settings, given)
    return go(settings, out, "train", _loader(settings.start))


def _check(settings: Settings, given: dict[str, Any]) -> None:
    if Path(str(settings.data)).is_dir():
        raise ConfigError(
            f"--data {settings.data}: one adapter is trained on one file; fadapt sweep trains an "
            "adapter for each file of a folder."
        )
    told = [
        f"--{k.replace('_', '-')}"
        for k in ("method", "rank", "alpha", "block_size", "targets")
        if k in given
    ]
    if settings.start is not None and told:
        raise ConfigError(f"{', '.join(told)}: the adapter in {settings.start} has its own.")


def _loader(start: str | None) -> Any:
    if start is None:
        return None

    return lambda model: load_peft(start, model)
