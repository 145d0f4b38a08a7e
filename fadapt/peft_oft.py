"""PEFT's format for OFT: ``oft_R`` and the options of ``OFTConfig``.

The same ``oft_R`` means one rotation by PEFT's exact form, nearly its inverse by PEFT's series, and
the first one again by our series. So a checkpoint says which form it is: ``peft_type: "OFT"`` with
``use_cayley_neumann`` is PEFT's; our series has a type of its own (``peft_oft_own.py``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fadapt.errors import CheckpointError
from fadapt.oft import OFT, OFTParams
from fadapt.peft_config import Format

SUFFIX = ".oft_R.weight"
# The format that is written here, and the oldest whose series is the same.
_WRITTEN, _OLDEST = "0.21.2", (0, 18)

SHARED = {
    "r": 0,
    "oft_block_size": 32,
    "module_dropout": 0.0,
    "coft": False,
    "eps": 6e-5,
    "block_share": False,
}
_OPTIONS = SHARED | {
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "peft_version": "",
}
INERT = frozenset({"init_weights"})
OFF: dict[str, Any] = {}


def read_shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of OFT that both types of checkpoint spell alike."""
    r, size = options["r"], options["oft_block_size"]
    if bool(r) == bool(size):
        raise CheckpointError(
            f"adapter_config.json: r={r} and oft_block_size={size}; PEFT wants one of them, and 0 "
            "for the other. (Before PEFT 0.14 there was no oft_block_size, and the parameters "
            "meant something else: train the adapter again.)"
        )
    return {
        "block_size": size or None,
        "blocks": r or None,
        "dropout": options["module_dropout"],
        "coft": options["coft"],
        "eps": options["eps"],
        "block_share": options["block_share"],
    }


def _read(options: Mapping[str, Any], shared: dict[str, Any]) -> OFT:
    series = options["use_cayley_neumann"]
    version = str(options["peft_version"]).partition("@")[0].split(".")[:2]
    numbers = tuple(int(part) for part in version if part.isdecimal())
    if series and (len(numbers) < 2 or numbers < _OLDEST):
        raise CheckpointError(
            f"adapter_config.json: peft_version={options['peft_version']!r} with "
            "use_cayley_neumann=True. PEFT 0.18 changed that series, so parameters that an earlier "
            "version trained mean another rotation now. Train the adapter again; or, if it was "
            'trained with 0.18 or later, write that as "peft_version".'
        )
    return OFT(
        **read_shared(options),
        cayley="neumann" if series else "exact",
        terms=options["num_cayley_neumann_terms"],
        form="peft" if series else "own",  # the exact forms are one
        **shared,
    )


def write_shared(method: OFT) -> dict[str, Any]:
    """The inverse of :func:`read_shared`."""
    return {
        "r": method.blocks or 0,
        "oft_block_size": method.block_size or 0,
        "module_dropout": method.dropout,
        "coft": method.coft,
        "eps": method.eps,
        "block_share": method.block_share,
    }


def _write(method: OFT, paths: Sequence[str]) -> dict[str, Any]:
    return write_shared(method) | {
        "use_cayley_neumann": method.cayley == "neumann",
        "num_cayley_neumann_terms": method.terms,
        "peft_version": _WRITTEN,
    }


def unpack(tensors: Mapping[str, Tensor], method: OFT) -> OFTParams:
    """One layer's parameters."""
    return OFTParams(tensors[SUFFIX])


def pack(params: Any) -> dict[str, Tensor]:
    """Their tensors, by suffix."""
    if not isinstance(params, OFTParams):
        raise CheckpointError(
            f"not saved: a {type(params).__name__} is what was prepared of an adapter; save the "
            "adapter itself."
        )
    return {SUFFIX: params.oft_R}


FORMAT = Format(
    "OFT", OFT, _OPTIONS, INERT, OFF, (SUFFIX,), _read, _write, unpack, pack,
    holds=lambda method: method.form == "peft" or method.cayley == "exact",
)  # fmt: skip
