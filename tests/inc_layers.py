"""Real INC layers on a CPU, by ``prepare``, a calibration pass and ``convert``.

INC warns at import and writes its measurements to a folder, so both are kept here: the folder is
temporary, and its loggers, filters and settings are as they were when this module is loaded.
"""

import logging
import tempfile
import warnings

import torch
from torch import nn

PCS = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    from neural_compressor.torch.quantization import FP8Config, convert, prepare

    logging.disable(level)


def quantized(
    model: nn.Module,
    x: torch.Tensor | None,
    method: str = "maxabs_arbitrary",
    hp: str = "bf16",
    fmt: str = "const",
    kind: str = "E4M3",
    finish: bool = True,
) -> nn.Module:
    """``model`` changed in place by INC: measured on ``x`` and, unless told not to, converted."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            config = FP8Config(
                fp8_config=kind,
                use_qdq=True,
                scale_method=method,
                hp_dtype=hp,
                scale_format=fmt,
                observer="maxabs",
                dump_stats_path=f"{folder}/stats",
            )
            model = prepare(model.to(DTYPES[hp]), config)
            if x is not None:
                with torch.no_grad():
                    model(x.to(DTYPES[hp]) if x.is_floating_point() else x)
            return convert(model) if finish else model
    finally:
        logging.disable(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(n_in: int, n_out: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=bias, device="meta").to_empty(device="cpu")
    for k, p in enumerate(layer.parameters()):
        p.data = normal(*p.shape, seed=seed + k) / n_in**0.5
    return layer


def inc_layer(n_in: int, n_out: int, bias: bool = True, **settings: str) -> nn.Module:
    """One layer ``[n_in] -> [n_out]``; some normal inputs lie beyond its range."""
    x = normal(16, n_in, seed=3).clamp(-1.5, 1.5)
    return quantized(nn.Sequential(linear(n_in, n_out, bias)), x, **settings)[0]
