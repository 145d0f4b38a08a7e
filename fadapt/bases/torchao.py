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


# What a 4 bit weight that is not read is packed for.
_KERNELS = {
    "Int4PreshuffledTensor": "the package mslk's, on CUDA",
    "Int4PlainInt32Tensor": "oneDNN's on XPU, or torch_npu's",
}


def _read_other(weight: Any, module: nn.Linear) -> Any:
    kind = type(weight).__name__
    if kind == "Int4OpaqueTensor":  # of torchao.prototype, which is not imported for it
        return fadapt.bases.int4_packed.read_opaque(weight, module)
    if kind == "Int4TilePackedTo4dTensor":
        return fadapt.bases.int4_packed.read_tile_packed(weight, module)
    why = ""
    if kind in _KERNELS:
        why = f" It is packed for one kernel ({_KERNELS[kind]}), in an order of its own."
    raise UnsupportedLayerError(
        f"torchao's {kind} is not read.{why} Read are Int8Tensor, Float8Tensor, and of 4 bits "
        "IntxUnpackedToInt8Tensor (IntxWeightOnlyConfig(weight_dtype=torch.int4, "
        "granularity=PerGroup(32))), Int4Tensor (Int4WeightOnlyConfig(), for which torchao needs "
        "the package mslk), Int4OpaqueTensor (torchao.prototype's, on a CPU) and "
        "Int4TilePackedTo4dTensor (on CUDA)."
    )


_found = check_version(version("torchao"))

from torchao.utils import TorchAOBaseTensor  # noqa: E402

import fadapt.bases.float8  # noqa: E402
import fadapt.bases.int4  # noqa: E402
import fadapt.bases.int4_packed  # noqa: E402
import fadapt.bases.int8  # noqa: E402
import fadapt.bases.intx  # noqa: E402

if _found < (0, 18):  # which no longer has the older tensors
    import fadapt.bases.affine

register_weight(TorchAOBaseTensor, _read_other)
