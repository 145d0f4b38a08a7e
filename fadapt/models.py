"""A folder of transformers becomes a frozen, quantized model and its tokenizer."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fadapt.errors import CheckpointError, ConfigError
from fadapt.quieting import quiet as without_words

SHIPPED = Path(__file__).parent / "data"


EAGER_UP_TO = 256  # tokens a window


def load_model(
    folder: Path, base: str, dtype: str = "auto", device: str = "cpu", length: int | None = 0
) -> nn.Module:
    """A causal LM, frozen, in evaluation mode, its linear layers in the format ``base``.

    The output embedding stays as it is, as is usual in the field.

    Args:
        folder: with config.json and safetensors; nothing is fetched from anywhere.
        base: a key of :data:`QUANTIZERS`.
        dtype: of everything that is not quantized; ``"auto"`` is bfloat16 on a GPU, else float32.
        device: where to.
        length: tokens a window. On a CPU the fused attention has no batching rule, so ``vmap`` runs
            it once an adapter: for short windows the plain one is faster (measured at 64: by a
            fifth; at 256 they tie), for long ones it takes too much memory. None, where nothing
            will be mapped over: transformers chooses the attention.

    Raises:
        CheckpointError: the folder is no such model, or its weights are not all there.
        ConfigError: no such device.
    """
    _check_folder(folder)
    chosen = pick_device(device)
    kind = ("float32" if chosen.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    attention = None
    if length is not None:
        attention = "eager" if chosen.type == "cpu" and length <= EAGER_UP_TO else "sdpa"
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, kind),
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
            )
        except Exception as error:  # transformers and safetensors raise of every kind here
            raise CheckpointError(f"--model {folder}: {_first_line(error)}") from error
    _check_length(model, length or 0)
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"--model {folder}: the weights of {len(missing)} tensors are not in the files, "
            f"{missing[0]!r} among them."
        )
    return QUANTIZERS[base](model.to(chosen).requires_grad_(False).eval())


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        CheckpointError: there is none that can be read.
    """
    _check_folder(folder)
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise CheckpointError(
                f"--model {folder}: no tokenizer can be read: {_first_line(error)}"
            ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"--model {folder}: its tokenizer has no end-of-text token.")
    return tokenizer


def context_of(folder: Path) -> int | None:
    """How many tokens the folder's model reads at most; None if its configuration does not say."""
    _check_folder(folder)
    config = load_config(folder).get_text_config()
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def load_config(folder: Path) -> Any:
    """transformers' configuration of a folder.

    Raises:
        CheckpointError: it cannot be read, or is of no model that this transformers has.
    """
    with quiet():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"--model {folder}: {_first_line(error)}") from error


def _dense(model: nn.Module) -> nn.Module:
    """Whatever the folder holds."""
    return model


def _aqlm(model: nn.Module) -> nn.Module:
    """2 codebooks of 8 bits for groups of 8, always from the same random numbers."""
    from fadapt.aqlm_files import quantize_model

    return quantize_model(model, generator=torch.Generator().manual_seed(0))


def _inc_fp8(model: nn.Module) -> nn.Module:
    """INC's own prepare and convert, E4M3 with a scale a channel; the activations' range is that of
    256 tokens drawn from the vocabulary, always the same."""
    with quiet():
        from fadapt.bases.inc_fresh import by_inc

    lm: Any = model
    names = [n for n, m in model.named_modules() if m is lm.get_output_embeddings()]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lm.config.vocab_size, (4, 64), generator=generator).to(lm.device)
    return by_inc(model, lambda: model(tokens), lm.dtype, names)  # type: ignore[no-any-return]


def _int8(model: nn.Module) -> nn.Module:
    with quiet():
        from torchao.quantization import Int8WeightOnlyConfig
    return _torchao(model, Int8WeightOnlyConfig())


def _float8(model: nn.Module) -> nn.Module:
    with quiet():
        from torchao.quantization import Float8WeightOnlyConfig
    return _torchao(model, Float8WeightOnlyConfig())


def _torchao(model: nn.Module, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    output = model.get_output_embeddings()  # type: ignore[operator]
    wanted = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    if not wanted:
        raise ConfigError(
            f"--base: this {type(model).__name__} has no nn.Linear that torchao quantizes "
            "(GPT-2's layers are Conv1D); use --base dense."
        )
    quantize_(model, config, filter_fn=lambda m, _: any(m is w for w in wanted))
    return model


# `--base` -> the model quantized, which may be the one it was given, changed in place.
# settings.BASES names the same.
QUANTIZERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "int8": _int8,
    "float8": _float8,
    "aqlm": _aqlm,
    "inc-fp8": _inc_fp8,
    "dense": _dense,
}


def fingerprint(folder: Path) -> str:
    """Of the model in a folder: its configuration and its weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def pick_device(name: str) -> torch.device:
    """The device of this name, if it is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # which "meta" cannot do
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {_first_line(error)}") from error
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' warnings, log lines and bars are kept from the terminal, for a while."""
    from transformers.utils import logging as theirs

    bars = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        with without_words():
            yield
    finally:
        if bars:
            theirs.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"--model {folder}: there is no such folder.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"--model {folder}: no config.json in it; expected a folder that transformers' "
            "save_pretrained wrote."
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"--model {folder}: no .safetensors file in it.")


def _check_length(model: Any, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ConfigError(f"--length {length}: this model reads at most {most} tokens.")


def _first_line(error: BaseException) -> str:
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
