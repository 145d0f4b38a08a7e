"""A checkpoint of OFT by our own series, which PEFT has no way to say.

The folder is laid out as PEFT's, under the ``peft_type`` FADAPT_OFT: PEFT, which would rotate the
other way, refuses it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fadapt.oft import OFT
from fadapt.peft_config import Format
from fadapt.peft_oft import INERT, OFF, SHARED, SUFFIX, pack, read_shared, unpack, write_shared


def _read(options: Mapping[str, Any], shared: dict[str, Any]) -> OFT:
    return OFT(**read_shared(options), cayley=options["cayley"], terms=options["terms"], **shared)


def _write(method: OFT, paths: Sequence[str]) -> dict[str, Any]:
    return write_shared(method) | {"cayley": method.cayley, "terms": method.terms}


FORMAT = Format(
    "FADAPT_OFT", OFT, SHARED | {"cayley": "neumann", "terms": 5}, INERT, OFF, (SUFFIX,),
    _read, _write, unpack, pack,
)  # fmt: skip
