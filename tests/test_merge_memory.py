"""What a merge holds at once: a layer under a limit of 8 MiB beyond its new weight, and a folder
under a limit far below its own size. The kernel holds the limit (RLIMIT_DATA), in a process of its
own; figures are in benchmarks/merge_memory.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import randomized

import fadapt as fa
from fadapt.models import quiet

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")

HEAD = """
import ctypes, resource, sys
from contextlib import contextmanager, suppress
import torch

@contextmanager
def at_most(more):
    "So many bytes beyond what the process has."
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        now = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))
    was = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, was[1]))
    try:
        with suppress(RuntimeError):
            torch.empty(more + 2**24, dtype=torch.uint8)
            print("no limit")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, was)
"""

LAYER = """
from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, PerTensor, quantize_
from torch.utils._pytree import tree_map
import fadapt as fa

methods = fa.LoRA(rank=8), fa.DoRA(rank=8), fa.OFT(block_size=32)
grains = PerRow(), PerGroup(128), PerTensor()
for width in (256, 2048):  # the first loads what is loaded on first use
    for grain in grains:
        model = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
        quantize_(model.requires_grad_(False), Int8WeightOnlyConfig(granularity=grain))
        for method in methods:
            g = torch.Generator().manual_seed(0)
            params = fa.init(method, model, generator=g)
            params = tree_map(lambda t: t + 0.01 * torch.randn(t.shape, generator=g), params)
            # What a rounding holds is the same for every method: once a granularity.
            more = ["search", "stochastic", "feedback"] * (method is methods[grains.index(grain)])
            for rounding in ("nearest", *more):
                told = {"generator": g, "moments": {"0": torch.eye(width)}}
                output = width**2 + 4 * model[0].weight.scale.numel()
                with at_most(output + 2**23):
                    fa.merge(model, params, method, rounding=rounding, **told)
                print(width, grain, method, rounding)
"""

FOLDER = """
from pathlib import Path
from fadapt.merge_folder import merge_folder

*first, model, adapter, out = map(Path, sys.argv[1:])
for to in (None, "int8"):
    merge_folder(first[0], [first[1]], out.with_name(f"first-{to}"), to=to)
    with at_most(2**24):  # half of the folder; the heap's holes are some MiB
        merge_folder(model, [adapter], out.with_name(f"out-{to}"), to=to)
    print("merged", to)
"""


def lines_of(program: str, *arguments: Path) -> list[str]:
    """What the program prints. In one thread, as each further one has a stack; and every block of
    memory goes back to the kernel when it is freed, so that what a process has is what it holds."""
    command = [sys.executable, "-W", "ignore", "-c", HEAD + program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "no limit" in done.stdout:
        pytest.skip("this kernel does not hold RLIMIT_DATA")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_layer_takes_less_than_8_mib_beyond_its_new_weight():
    assert len(lines_of(LAYER)) == 2 * (3 * 3 + 3 * 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A model of one small layer, and one of 24 MiB, each with its adapter."""
    with quiet():
        from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for width, layers in ((64, 1), (256, 16)):
        root = tmp_path_factory.mktemp("memory")
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=64,
        )
        model = LlamaForCausalLM(config).bfloat16()
        with quiet():
            model.save_pretrained(root / "model", max_shard_size="20MB")
        method = fa.LoRA(rank=4, targets="all-linear", exclude=["lm_head"])
        fresh = fa.init(method, model, generator=torch.Generator().manual_seed(0))
        fa.save_peft(root / "adapter", randomized(fresh, 0), method)
        found += [root / "model", root / "adapter"]
    return found


def test_a_folder_takes_a_small_part_of_its_own_size(folders, tmp_path):
    size = sum(f.stat().st_size for f in folders[2].glob("*.safetensors"))
    assert size > 4 * 2**23
    assert len(list(folders[2].glob("*.safetensors"))) > 1
    told = lines_of(FOLDER, *folders, tmp_path / "out")
    assert told == ["merged None", "merged int8"]
