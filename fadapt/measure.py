"""How much of an adapter's change a merge keeps, in the weight and in the outputs."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """Of W (old), T (wanted: W + ΔW) and V (merged), in the norm ``|M|^2 = tr(M H M^T)``.

    With ``H = X^T X`` it is the norm of outputs on X, with ``H = I`` that of the weight.

    Attributes:
        delta: ``|T - W| / |T|``; dropping the adapter errs by that much.
        captured: ``<V - W, T - W> / |T - W|^2``: 1 if all of the change is there (or none was
            asked for), 0 if none, beside whatever noise.
        error: ``|V - T| / |T|``.
    """

    delta: float
    captured: float
    error: float

    @property
    def snr(self) -> float:
        """Of T over the error, in dB; infinite without error."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


def shares(blocks: Iterable[tuple[Tensor, Tensor, Tensor]], moment: Tensor | None = None) -> Shares:
    """Measure from blocks of rows ``(old, wanted, merged)``, each ``[rows, in]``.

    Args:
        blocks: of the same rows each.
        moment: H ``[in, in]``; None for I.
    """
    total = torch.zeros(4, dtype=torch.float64)
    H = None if moment is None else moment.double()
    for old, wanted, merged in blocks:
        T = wanted.double()
        change, error = T - old.double(), merged.double() - T
        weighed = [m if H is None else m @ H for m in (change, T)]
        moved = change + error
        total += torch.stack(
            [
                (weighed[0] * change).sum(),
                (weighed[1] * T).sum(),
                (weighed[0] * moved).sum(),
                (error * (error if H is None else error @ H)).sum(),
            ]
        ).cpu()
    change2, wanted2, along, error2 = total.clamp(min=0).tolist()
    along = total[2].item()
    if wanted2 == 0:
        return Shares(0.0, 1.0, 0.0 if error2 == 0 else math.inf)
    return Shares(
        delta=math.sqrt(change2 / wanted2),
        captured=1.0 if change2 == 0 else along / change2,
        error=math.sqrt(error2 / wanted2),
    )
