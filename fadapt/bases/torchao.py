"""torchao's quantized weights: the readers of its tensors, and what to do about the others."""

from importlib.metadata import version
from typing import Any

from torch import nn

from fadapt.bases.protocol import register_weight
from fadapt.errors import UnsupportedLayerError

OLDEST = (0, 16)  # the oldest on which the suite is green; PEFT refuses older ones too


def check_version(found: str) -> tuple[int, ...]:
    """The version, or UnsupportedLayerError for a torchao that fadapt does not read."""
    parts = tuple(int(part) for part in found.split(".")[:2])
    if parts < OLDEST:
        raise UnsupportedLayerError(
            f"torchao {found} is installed; fadapt reads the tensors of torchao 0.16 to 0.18. "
            "pip install 'torchao>=0.16,<0.19', and quantize the model again."
        )
    return parts


def _refuse_int4(weight: Any, module: nn.Linear) -> Any:
    raise UnsupportedLayerError(
        f"torchao's {type(weight).__name__} is packed for one kernel (the package mslk's, or "
        "CUDA's tinygemm), which has no derivative. Int4 that fadapt reads: "
        "IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))."
    )


_found = check_version(version("torchao"))

import torchao.quantization as _quantization  # noqa: E402

import fadapt.bases.float8  # noqa: E402
import fadapt.bases.int8  # noqa: E402
import fadapt.bases.intx  # noqa: E402, F401

if _found < (0, 18):  # which no longer has the older tensors
    import fadapt.bases.affine  # noqa: F401

for _name in dir(_quantization):
    if _name.startswith("Int4") and isinstance(getattr(_quantization, _name), type):
        _kind = getattr(_quantization, _name)
        if hasattr(_kind, "__tensor_flatten__"):
            register_weight(_kind, _refuse_int4)
