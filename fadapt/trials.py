"""The grid of a sweep: what each of the K adapters is trained with."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fadapt.dora import DoRA
from fadapt.lora import LoRA
from fadapt.oft import OFT
from fadapt.settings import Settings


class Trial(NamedTuple):
    """One adapter of a sweep.

    Attributes:
        name: of its folder and its row; unique in the sweep.
        data: name of the text it is trained on.
        lr: its highest learning rate.
        seed: of its first weights, the order of its text and its dropout.
        method: its hyperparameters.
    """

    name: str
    data: str
    lr: float
    seed: int
    method: Any


def grid(settings: Settings, data: Sequence[str]) -> list[Trial]:
    """Every combination of the settings' axes, for each text.

    Args:
        settings: its tuples are the axes.
        data: names of the texts.
    """
    axes = (data, settings.lr, settings.rank, settings.alpha, settings.targets, settings.seed)
    trials = []
    for text, lr, rank, alpha, targets, seed in itertools.product(*axes):
        parts = [
            (data, text),
            (settings.lr, f"lr{lr:g}"),
            (settings.rank, f"r{rank}"),
            (settings.alpha, f"a{alpha:g}"),
            (settings.targets, f"t{settings.targets.index(targets)}"),
            (settings.seed, f"s{seed}"),
        ]
        name = "-".join(part for axis, part in parts if len(axis) > 1) or "adapter"
        method = _method(settings, rank, alpha, parse_targets(targets))
        trials.append(Trial(name, text, lr, seed, method))
    return trials


def _method(settings: Settings, rank: int, alpha: float, targets: str | list[str]) -> Any:
    shared: Any = {"targets": targets, "dropout": settings.dropout or 0.0}
    if settings.method == "oft":
        return OFT(block_size=settings.block_size, **shared)
    if settings.method == "dora":
        return DoRA(rank=rank, alpha=alpha, **shared)
    return LoRA(rank=rank, alpha=alpha, rslora=settings.method == "rslora", **shared)


def parse_targets(text: str) -> str | list[str]:
    """``"q_proj,v_proj"`` is a list of path endings; any other string is as in ``LoRA.targets``."""
    if text == "all-linear" or not re.fullmatch(r"[\w.]+(,[\w.]+)*", text):
        return text
    return text.split(",")
