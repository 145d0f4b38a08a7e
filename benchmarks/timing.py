"""Timing for the benchmarks: every side of a ratio measured in one run, turn by turn."""

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def machine(device: str) -> str:
    """One line that names what the figures were measured on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as info:
            models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {name}"


def once(run: Callable[[], object], device: str) -> float:
    """Seconds that one call takes, the device's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(
    sides: Mapping[str, Callable[[], object]], device: str, seconds: float = 2.0
) -> dict[str, float]:
    """The median seconds of each side.

    Sides take turns, so that a busy machine hits all alike; in an order drawn anew each time, so
    that none is always the one that finds the caches warm.
    """
    for run in sides.values():
        run()
        run()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    order = random.Random(0)
    end = time.perf_counter() + seconds * len(sides)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
        for name, run in order.sample(list(sides.items()), len(sides)):
            taken[name].append(once(run, device))
    return {name: statistics.median(times) for name, times in taken.items()}
