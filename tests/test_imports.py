"""``import fadapt`` needs torch alone, imports no backend, and changes nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import fadapt as fa

ROOT = Path(fa.__file__).parent
BACKENDS = {
    "torchao", "aqlm", "neural_compressor", "habana_frameworks", "transformers", "peft",
    "safetensors", "rich", "matplotlib", "yaml", "onnx", "onnxscript", "onnxruntime", "hypothesis",
    "numba", "triton",
}  # fmt: skip

SCRIPT = """
import json, logging, os, sys, warnings
import torch

def state():
    loggers = {"root": logging.root} | logging.root.manager.loggerDict
    return {
        "levels": {
            n: [l.level, l.disabled, l.propagate, list(map(repr, l.handlers))]
            for n, l in loggers.items()
            if isinstance(l, logging.Logger) and not n.startswith("fadapt")
        },
        "rng": torch.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(map(repr, warnings.filters)),
        "environment": dict(os.environ),
        "path": sys.path,
        "excepthook": repr(sys.excepthook),
    }

before, held = state(), set(sys.modules)
warnings.simplefilter("error")  # so that a warning at import fails
before["warnings"] = state()["warnings"]
import fadapt
after = state()
new = {m.split(".")[0] for m in set(sys.modules) - held}
json.dump({"changed": [k for k in before if before[k] != after[k]], "new": sorted(new)}, sys.stdout)
"""


def test_import_brings_torch_alone_and_changes_nothing():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["changed"] == []
    assert not BACKENDS & set(found["new"])
    assert set(found["new"]) - set(sys.stdlib_module_names) <= {"fadapt", "torch"}
    assert run.stderr == ""


def test_every_public_name_is_there():
    assert len(set(fa.__all__)) == len(fa.__all__)
    for name in fa.__all__:
        assert getattr(fa, name) is not None
        assert name in dir(fa)


def test_what_the_package_imports_at_module_level_is_declared():
    """Only the module that is a backend's own may import it when it is itself imported."""
    allowed = set(sys.stdlib_module_names) | {"fadapt", "torch"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("bases/*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {str(node.module).split(".")[0]}
            else:
                continue
            assert roots <= allowed | BACKENDS, path
