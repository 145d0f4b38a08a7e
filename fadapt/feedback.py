"""Rounding with feedback: the error of each column is carried into the columns after it, for the
smallest error of the *outputs*.

GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), in the form that Chee et al. 2023 (QuIP,
arXiv:2307.13304, equations 3 and 4) call LDLQ and prove to be the same (theorem 6): with
``X^T X = U D U^T``, U unit upper triangular, column k of W becomes

    v_k = Q(w_k + (W - V)[:, :k] U[:k, k])

so that one triangular factor of X^T X itself is enough: no inverse, and no factor of that.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from fadapt.bases.grid import Grid
from fadapt.errors import AdapterError

WIDTH = 128  # columns of a panel
PIECE = 512  # rows of one that are read at once
HELD = 2**22  # bytes of U that a CPU's memory is to hold; a larger one goes to a file


@contextlib.contextmanager
def factored(
    moment: Tensor, dtype: torch.dtype, device: torch.device, path: str
) -> Iterator["Factor"]:
    """The :class:`Factor` of ``moment``. A large one of a CPU lies in a temporary file that has no
    name, in ``tempfile.gettempdir()``, if there is such a folder."""
    with contextlib.ExitStack() as stack:
        file: IO[bytes] | None = None
        if device.type == "cpu" and moment.numel() * dtype.itemsize > 2 * HELD:
            with contextlib.suppress(OSError):
                file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        yield Factor(file, moment, dtype, device, path)


class Factor:
    """``U`` of ``H = U D U^T``; H is ``X^T X`` damped by 1 % of its mean diagonal.

    Args:
        file: where U is put, and read from piece by piece: what is held is one panel while U is
            made, and one piece then. What the disk has no room for stays in memory; without a file
            all does.
        moment: ``X^T X [in, in]``; left as it is.
        dtype: that U is computed in.
        device: that U is for.
        path: of the layer, for messages.

    Raises:
        AdapterError: ``moment`` is of no inputs: it is not positive definite, or not finite.
    """

    def __init__(
        self,
        file: IO[bytes] | None,
        moment: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        path: str,
    ):
        moment, self._size = moment.detach(), len(moment)
        n = self._size
        self._kept: dict[int, Tensor] = {}
        self._at: dict[int, int] = {}  # where a panel starts in the file
        self._file = file
        self._buffer = torch.empty(PIECE * WIDTH, dtype=dtype, device=device)
        made = torch.empty(n * WIDTH, dtype=dtype, device=device)
        diagonal = moment.diagonal().to(dtype)
        damp = 0.01 * diagonal.mean().clamp(min=torch.finfo(dtype).tiny)
        D = torch.empty(n, dtype=dtype, device=device)
        # From the right: each panel less what the panels beyond it explain.
        for start in reversed(range(0, n, WIDTH)):
            stop = min(start + WIDTH, n)
            own = slice(start, stop)
            panel = made[: stop * (stop - start)].view(stop, stop - start)
            panel.copy_(moment[:stop, own])
            square = panel[own]
            square.diagonal().add_(damp.to(device))
            for right in range(stop, n, WIDTH):
                scaled = self.read(right, own) * D[right : right + WIDTH]
                for rows in pieces(stop):
                    panel[rows].addmm_(self.read(right, rows), scaled.T, alpha=-1)
            lower, failed = torch.linalg.cholesky_ex(square.flip(0, 1))
            if bool(failed) or not bool(lower.isfinite().all()):
                raise AdapterError(
                    f"moments: that of layer {path!r} is no X^T X of inputs (it holds NaN or Inf, "
                    "or is not positive definite). fadapt.calibrate makes them."
                )
            root = lower.flip(0, 1)  # of the square: root root^T, upper triangular
            steps = root.diagonal()
            D[own] = steps.square()
            eye = torch.eye(stop - start, dtype=dtype, device=device)
            inverse = torch.linalg.solve_triangular(root, eye, upper=True).T / steps
            square.copy_(root / steps)
            for rows in pieces(start):
                panel[rows] = panel[rows] @ inverse
            self._keep(start, panel)

    def read(self, start: int, rows: slice) -> Tensor:
        """``U[rows, start : start + WIDTH]`` of at most ``PIECE`` rows, to be used before the next
        call."""
        if start in self._kept:
            return self._kept[start][rows]
        assert self._file is not None
        width = min(WIDTH, self._size - start)
        found = self._buffer[: (rows.stop - rows.start) * width].view(-1, width)
        self._file.seek(self._at[start] + rows.start * width * found.itemsize)
        rest = _bytes(found)
        while rest:
            count = self._file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise OSError("a temporary file became shorter")
            rest = rest[count:]
        return found

    def _keep(self, start: int, panel: Tensor) -> None:
        if self._file is not None:
            at = self._file.seek(0, 2)
            rest = _bytes(panel)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._at[start] = at
                return
            except OSError:  # the disk is full
                pass
        self._kept[start] = panel.clone()


def _bytes(tensor: Tensor) -> memoryview:
    raw: Any = tensor.numpy()
    return memoryview(raw).cast("B")


def pieces(stop: int) -> Iterator[slice]:
    """The rows up to ``stop``, by ``PIECE``."""
    for start in range(0, stop, PIECE):
        yield slice(start, min(start + PIECE, stop))


def feedback(grid: Grid, weight: Tensor, factor: Factor, codes: Tensor) -> None:
    """Round ``weight`` ``[rows, in]`` column by column, each error passed on.

    Args:
        grid: of these rows.
        weight: scratch: the errors ``W - V`` take its place.
        factor: of the layer's inputs.
        codes: ``[rows, in]``, which is written.
    """
    n_in = weight.shape[1]
    for start in range(0, n_in, WIDTH):
        stop = min(start + WIDTH, n_in)
        # Transposed, so that a column of W lies together.
        own = weight[:, start:stop].T.contiguous()
        wanted = own.clone()
        for rows in pieces(start):
            wanted.addmm_(factor.read(start, rows).T, weight[:, rows].T)
        square = factor.read(start, slice(start, stop))
        found = torch.empty(own.shape, dtype=grid.kind, device=own.device)
        for j, (column, shifted, factors) in enumerate(zip(own, wanted, square.T, strict=True)):
            shifted.addmv_(own[:j].T, factors[:j])
            one = grid.columns(slice(start + j, start + j + 1), n_in)
            code = one.nearest(shifted[:, None])
            found[j] = code[:, 0]
            column -= one.values(code, own.dtype)[:, 0]
        codes[:, start:stop] = found.T
        weight[:, start:stop] = own.T
