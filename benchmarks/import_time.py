"""What ``import fadapt`` takes beside ``import torch``, in fresh interpreters, turn by turn.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

from timing import machine

CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds(package: str) -> float:
    run = [sys.executable, "-c", CODE.format(package)]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    taken = {"torch": [], "fadapt": []}
    for _ in range(15):
        for package, times in taken.items():
            times.append(seconds(package))
    torch, fadapt = (statistics.median(times) for times in taken.values())
    print(machine("cpu"))
    print(f"import torch {torch:.3f} s, import fadapt {fadapt:.3f} s: {fadapt / torch:.3f}x")


if __name__ == "__main__":
    main()
