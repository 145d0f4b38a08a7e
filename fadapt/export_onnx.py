"""An exported program as an ONNX file."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fadapt.errors import ConfigError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# A protobuf, and so a model in one file, may have 2 GiB; something is left for the graph.
INLINE_BYTES = 2**31 - 2**26
OPSET = 21  # the first in which float8 weights can be transposed


def write_onnx(
    program: "ExportedProgram",
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str] | None,
    axes: Sequence[Mapping[int, str]],
    opset: int | None,
    external_data: bool | None,
) -> None:
    """Write the program, its int8 weights as they are.

    Args:
        program: its flat inputs are named ``inputs``, its flat outputs ``outputs``.
        path: the file; weights beside it go to ``NAME.data``.
        inputs, outputs: names; outputs as torch names them if None.
        axes: of each input, the names of its dynamic axes.
        opset: of ONNX; :data:`OPSET` if None.
        external_data: whether the weights go to a file of their own; if None, where they must.

    Raises:
        ConfigError: something in the graph has no form in ONNX, or not in this opset.
    """
    if external_data is None:
        tensors = (*program.state_dict.values(), *program.constants.values())
        size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        external_data = size > INLINE_BYTES
    table: dict[Callable, Callable] = {torch.ops.aten._int_mm.default: _int_mm()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of axes of one size, whose first name is taken
            torch.onnx.export(
                program,
                f=str(path),
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=list(axes),
                opset_version=OPSET if opset is None else opset,
                external_data=external_data,
                custom_translation_table=table,
                optimize=False,  # it would fold small int8 weights to floats
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise _refusal(cause) from error
    _check(path, OPSET if opset is None else opset)


def _check(path: Path, opset: int) -> None:
    import onnx

    found = {
        one.domain: one.version for one in onnx.load(path, load_external_data=False).opset_import
    }
    if found.get("") != opset:
        raise ConfigError(
            f"opset {opset}: torch.onnx has no form of this graph in it, and wrote opset "
            f"{found.get('')}. {OPSET} is the default."
        )

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refusal(error) from error


def _refusal(cause: BaseException) -> ConfigError:
    return ConfigError(
        f"ONNX has no form for something in this graph: {' '.join(str(cause).split())[:300]} Of a "
        "bfloat16 model, export it in float32; else to .pt2, which has every operation."
    )


def _int_mm() -> Callable[..., Any]:
    """int8 times int8 in int32, exactly."""
    from onnxscript import opset18 as op

    def multiply(self: Any, mat2: Any) -> Any:
        return op.MatMulInteger(self, mat2)

    return multiply
