"""How the layers of each format lie in the files of a transformers folder, read and written.

Dense: ``weight``. torchao: the tensors of each weight, under names of their own, and a description
in the files' metadata (``torchao/prototype/safetensors``). AQLM: ``codes``, ``codebooks`` and
``scales``. ``quantization_config`` in config.json says which.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.bases import Base
from fadapt.errors import CheckpointError, ConfigError
from fadapt.formats import AqlmFormat, like_named, put
from fadapt.models import load_config, quiet
from fadapt.shell import join

# A folder has one floating dtype: float32, bfloat16 and float16 are no formats of single layers.
TARGETS = (
    "dense, float8, int8, int8-tensor, int8-group<size>, int8-dynamic, int<bits>, "
    "int<bits>-group<size>, aqlm-<codebooks>x<bits>, aqlm-<codebooks>x<bits>-group<size>"
)
PLAIN = json.dumps({"_type": "Tensor"})  # of tensors that are no subclass's, in torchao's metadata


def quantized_by(folder: Path, config: Mapping[str, Any]) -> str | None:
    """What a folder's layers are quantized by: ``"torchao"``, ``"aqlm"``, None.

    Raises:
        CheckpointError: something else.
    """
    kind = (config.get("quantization_config") or {}).get("quant_method")
    if kind in (None, "torchao", "aqlm"):
        return kind  # type: ignore[no-any-return]
    raise CheckpointError(
        f"--model {folder} is quantized ({kind}), and its files cannot be merged into one by one: "
        "those of dense, torchao's and AQLM's layers can. Load it and call fadapt.merged_model, or "
        "merge into the model that it was quantized from."
    )


def check_target(to: str) -> None:
    """Raise ConfigError if no folder can be written in the format ``to``, whatever the model."""
    if to == "inc-fp8":
        raise ConfigError(
            "--to inc-fp8: INC's layers need calibration inputs, and INC writes its folders from a "
            "model in memory. Load the model, and call fadapt.merged_model(..., to='inc-fp8', "
            "amax=fadapt.input_amax(...)) and fadapt.inc_files.save_inc_model."
        )
    if to in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--to {to}: a folder has one floating dtype. Formats: {TARGETS}.")


def skeleton(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """The folder's model without its weights, its layers of the kind that the files hold.

    Raises:
        CheckpointError: no such configuration, or a model that this transformers does not have.
    """
    with quiet():
        import transformers

        loaded = load_config(folder)
        name = (loaded.architectures or [""])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise CheckpointError(
                f"--model {folder}: config.json names the architecture {name!r}, which this "
                f"transformers {transformers.__version__} does not have."
            )
        with torch.device("meta"):
            model: nn.Module = kind(loaded)
        if quantized_by(folder, config) == "aqlm":
            from transformers.integrations.aqlm import replace_with_aqlm_linear

            told = dict(config["quantization_config"])
            settings = transformers.AqlmConfig.from_dict(told)
            skipped = settings.linear_weights_not_to_quantize
            model = replace_with_aqlm_linear(model, skipped, settings)
    return model.eval().requires_grad_(False)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Put the tensors of a folder's files into its skeleton."""
    for name, tensor in {**tensors, **_subclasses(tensors, metadata)}.items():
        try:
            model.get_parameter(name)
        except AttributeError:
            continue
        put(model, name, tensor)


def _subclasses(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """torchao's weights, each made of its parts."""
    found: dict[str, Tensor] = {}
    for name, text in metadata.items():
        if name == "tensor_names" or not text.startswith("{") or text == PLAIN:
            continue
        from torchao.prototype.safetensors.safetensors_utils import object_from_dict

        told = json.loads(text)
        parts = {key: tensors[_part(name, key)] for key in told.get("_tensor_data_names", ())}
        if parts:
            found[name] = object_from_dict(told | {"_data": told["_data"] | parts})
    return found


def _part(name: str, key: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}._{leaf}_{key}"


def flat(path: str, base: Base) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A base's tensors by their names in the files, and torchao's description of its weight."""
    tensors, metadata = {}, {}
    for leaf, tensor in base.state().items():
        name = join(path, leaf)
        names = getattr(tensor, "tensor_data_names", None)
        if names is None:
            tensors[name] = tensor
            continue
        from torchao.prototype.safetensors import safetensors_utils as theirs

        whole: Any = tensor
        for key in (*names, *getattr(whole, "optional_tensor_data_names", ())):
            if getattr(whole, key) is not None:
                tensors[_part(name, key)] = getattr(whole, key)
        metadata[name] = json.dumps(whole, cls=theirs.TensorSubclassAttributeJSONEncoder)
    return tensors, metadata


def metadata_of(names: Iterable[str], described: Mapping[str, str]) -> dict[str, str]:
    """The metadata of every file of a folder: torchao's, where there are weights of its."""
    if not described:
        return {"format": "pt"}
    parts = {
        _part(name, key)
        for name, text in described.items()
        for key in json.loads(text)["_tensor_data_names"]
    }
    plain = {name: PLAIN for name in names if name not in parts}
    found = plain | dict(described)
    return found | {"format": "pt", "tensor_names": json.dumps(list(found))}


def empty(to: str, base: Base, path: str) -> Any:
    """A base like ``base`` in the format ``to``, of the right shapes; its numbers mean nothing."""
    try:
        like = like_named(to, base, path)
    except ConfigError as error:
        raise ConfigError(f"--to: layer {path!r}: {error}") from error
    if isinstance(like, AqlmFormat):
        from fadapt.bases.aqlm import Aqlm

        books, bits, group = like
        n_out, groups = base.out_features, base.in_features // group
        kind = torch.int8 if bits <= 8 else torch.int16
        return Aqlm(
            codes=torch.empty(n_out, groups, books, dtype=kind, device="meta"),
            codebooks=torch.empty(books, 2**bits, 1, group, dtype=base.dtype, device="meta"),
            scales=torch.empty(n_out, 1, 1, 1, dtype=base.dtype, device="meta"),
        )
    return like


def quantization_config(to: str, skipped: Sequence[str]) -> dict[str, Any] | None:
    """What config.json says of a folder whose layers but ``skipped`` are of the format ``to``."""
    if to == "dense":
        return None
    with quiet():
        from transformers import AqlmConfig, TorchAoConfig

        if found := re.fullmatch(r"aqlm-(\d+)x(\d+)(?:-group(\d+))?", to):
            aqlm = AqlmConfig(
                in_group_size=int(found[3] or 8),
                out_group_size=1,
                num_codebooks=int(found[1]),
                nbits_per_codebook=int(found[2]),
                linear_weights_not_to_quantize=list(skipped),
            )
            return aqlm.to_dict()  # type: ignore[no-any-return]
        config = TorchAoConfig(_torchao(to), modules_to_not_convert=list(skipped))
        return config.to_dict()  # type: ignore[no-any-return]


def _torchao(to: str) -> Any:
    from torchao import quantization as q

    kind, _, how = to.partition("-")
    group = q.PerGroup(int(how.removeprefix("group"))) if how.startswith("group") else None
    if kind == "float8":
        return q.Float8WeightOnlyConfig()
    if how == "dynamic":
        return q.Int8DynamicActivationInt8WeightConfig()
    if kind == "int8":
        return q.Int8WeightOnlyConfig(
            granularity=group or (q.PerTensor() if how == "tensor" else q.PerRow())
        )
    bits = getattr(torch, kind)
    return q.IntxWeightOnlyConfig(weight_dtype=bits, granularity=group or q.PerAxis(0))
