"""Which row of a batch wears which adapter, and the products in which each row has its own matrix.

Two forms of such a product. *Gather*: copy out each row's matrix, one ``bmm``; plain torch, right
under every transform, and what CUDA graphs capture. *Grouped*: the rows sorted by adapter once for
all layers, one ``_grouped_mm``; on a CPU and for few tokens it is faster, as no matrix is copied
(measured at 1024 x 1024: 256 rows of 32 adapters 1.8 times, 32 rows 1.2 times; from 32 tokens on
the gather wins).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fadapt._pytree import frozen_pytree
from fadapt.errors import AdapterError

# Tokens a row below which the grouped product is taken where it can be.
FEW_TOKENS = 32
BASE = -1


@frozen_pytree
@dataclass(frozen=True)
class Rows:
    """A batch's ids, checked and laid out once for all layers. Made by :func:`rows_of`.

    Attributes:
        ids: int64 ``[n]`` in ``[0, K)``; 0 for a row of the base. None if all rows are the base's.
        live: boolean ``[n]``, False for a row of the base; None if there is no such row.
        order: int64 ``[m]``, the live rows sorted by adapter; None where ids could not be read.
        ends: int32 ``[K]``, where each adapter's rows end in ``order``; None as ``order``.
        grid: ``ids`` as ``[K, n / K]`` where every adapter has as many rows, one after the other
            in the bank's order, as in a training step; else None. Then no matrix is copied.
    """

    ids: Tensor | None = None
    live: Tensor | None = None
    order: Tensor | None = None
    ends: Tensor | None = None
    grid: Tensor | None = None

    @property
    def size(self) -> int | None:
        """K, where the layout depends on it; else None."""
        laid = self.ends if self.grid is None else self.grid
        return None if laid is None else laid.shape[0]

    def products(self, x: Tensor) -> int:
        """How many matrices :meth:`pick` gives for x ``[n, ...]``: n, or K on a grid."""
        # Not len(), which is a constant to torch.export.
        return (x if self.grid is None else self.grid).shape[0]

    def pick(self, values: Tensor) -> Tensor:
        """Each product's own of ``values [K, ...]``: ``[n, ...]``; on a grid ``values`` itself."""
        if self.grid is not None:
            return values
        assert self.ids is not None
        return values.index_select(0, self.ids)

    def take(self, values: Tensor, like: Tensor) -> Tensor:
        """Each row's own of ``values [K, d]``, as ``[n, 1, ..., d]`` to go with ``like``."""
        assert self.ids is not None
        own = values.index_select(0, self.ids)
        return own.reshape(own.shape[0], *[1] * (like.dim() - 2), own.shape[-1])


def rows_of(
    ids: Sequence[int] | Tensor, sizes: Sequence[int], device: torch.device | None
) -> tuple[Rows, ...]:
    """Check ids, and lay them out.

    Args:
        ids: ``[n]`` integers, -1 for the base, else in ``[0, K)``. They are read in Python, unless
            they are traced, mapped over or about to be captured into a CUDA graph: then they cannot
            be checked, and every negative one is the base.
        sizes: of each kind of adapter in the bank: the first ``sizes[0]`` ids are the first kind's,
            and so on. Their sum is K.
        device: of the bank; where the ids go.

    Returns:
        One for each kind, for which the rows of other kinds are the base's.

    Raises:
        AdapterError: ids that are no integers, or out of range.
    """
    ids, given = checked_ids(ids, sum(sizes))
    ids = ids.to(device=device, dtype=torch.int64)
    each, start = [], 0
    for size in sizes:
        stop = start + size
        mine = ids - start if start else ids
        if given is None:
            live = ids >= 0 if len(sizes) == 1 else (ids >= start) & (ids < stop)
            each.append(Rows(torch.where(live, mine, 0), live))
        else:
            each.append(_lay_out(mine, [k - start for k in given] if start else given, size))
        start = stop
    return tuple(each)


def checked_ids(ids: Sequence[int] | Tensor, count: int) -> tuple[Tensor, list[int] | None]:
    """Ids ``[n]`` as a tensor, and as numbers: None where they cannot be read.

    Args:
        ids: as :func:`rows_of`.
        count: of the adapters.

    Raises:
        AdapterError: ids that are no integers, or out of range.
    """
    given: list[int] | None
    if not isinstance(ids, Tensor):
        given = _integers(ids)
        ids = torch.tensor(given, dtype=torch.int64)
        given = None if torch.compiler.is_compiling() else given
    elif ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.dim() != 1:
        raise AdapterError(
            f"ids: expected integers [n], one a row of the batch; got {ids.dtype} "
            f"{list(ids.shape)}."
        )
    else:
        given = _concrete(ids)
    if given and (min(given) < BASE or max(given) >= count):
        wrong = sorted({k for k in given if not BASE <= k < count})
        raise AdapterError(
            f"ids {wrong[:8]} are not in this bank of {count} adapters: an id lies in "
            f"[0, {count}), or is -1 for the base."
        )
    return ids, given


def _lay_out(ids: Tensor, given: Sequence[int], size: int) -> Rows:
    live = [0 <= k < size for k in given]
    if not any(live):
        return Rows()
    each, rest = divmod(len(given), size)
    ends = given[0] == 0 and given[-1] == size - 1 and not rest
    if ends and list(given) == [k for k in range(size) for _ in range(each)]:
        return Rows(ids, grid=ids.reshape(size, each))
    mask = None if all(live) else torch.tensor(live, device=ids.device)
    clamped = ids if mask is None else torch.where(mask, ids, 0)
    if ids.device.type != "cpu":
        return Rows(clamped, mask)
    order = torch.argsort(clamped, stable=True)
    if mask is not None:
        order = order[mask[order]]
    counts = torch.bincount(clamped[order], minlength=size)
    return Rows(clamped, mask, order, counts.cumsum(0).to(torch.int32))


def add_low_rank(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    rows: Rows,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``y_i + scaling (B_k A_k x_i + bias_k)``, k the adapter of row i; y_i itself for the base.

    Args:
        y: ``[n, ..., out]``.
        x: ``[n, ..., in]`` in the dtype of A.
        A, B: ``[K, r, in]`` and ``[K, out, r]``.
        rows: of the batch.
        scaling: of the update.
        bias: ``[K, out]`` or None.
    """
    # [products, rows of each, in]: a product a row of the batch, or one an adapter.
    whole = x.dim() == 3 and rows.grid is None
    flat = x if whole else x.reshape(rows.products(x), -1, x.shape[-1])
    if rows.order is not None and _grouped_pays(flat, A, B, rows):
        return _add_grouped(y, flat, A, B, rows, scaling, bias)
    h = torch.bmm(flat, rows.pick(A).mT)
    of_rows = rows.pick(B).mT
    out = y if whole else y.reshape(flat.shape[0], -1, y.shape[-1])
    if bias is None and out.dtype == h.dtype:
        total = torch.baddbmm(out, h, of_rows, alpha=scaling)
    else:
        if scaling != 1:
            h = h * scaling
        update = torch.bmm(h, of_rows)
        if bias is not None:
            update = update + rows.pick(bias * scaling).unsqueeze(1)
        total = out + update.to(out.dtype)
    return keep_base(total if whole else total.reshape(y.shape), y, rows)


def keep_base(adapted: Tensor, plain: Tensor, rows: Rows) -> Tensor:
    """Row i of ``adapted``, or of ``plain`` where row i is the base's: both ``[n, ...]``."""
    if rows.live is None:
        return adapted
    return torch.where(rows.live.reshape(-1, *[1] * (plain.dim() - 1)), adapted, plain)


def _add_grouped(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    rows: Rows,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    order, ends = rows.order, rows.ends
    assert order is not None
    assert ends is not None
    tokens = x.shape[1]
    ordered = x.index_select(0, order).flatten(0, 1)
    offs = ends * tokens
    h = torch._grouped_mm(ordered, A.mT, offs=offs)
    if scaling != 1:
        h = h * scaling
    update = torch._grouped_mm(h, B.mT, offs=offs).unflatten(0, (-1, tokens))
    if bias is not None:
        owner = torch.searchsorted(ends, torch.arange(len(order)), right=True)
        update = update + (bias * scaling).index_select(0, owner).unsqueeze(1)
    out = y.reshape(y.shape[0], -1, y.shape[-1])
    return out.index_add(0, order, update.to(y.dtype)).reshape(y.shape)


def _grouped_pays(x: Tensor, A: Tensor, B: Tensor, rows: Rows) -> bool:
    # Inference alone: the grouped product has no rule for vmap, jvp and batched gradients.
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and (x.requires_grad or A.requires_grad))
        and x.shape[1] < FEW_TOKENS
        and A.dtype == torch.float32 == x.dtype
        # _grouped_mm wants rows of 16 bytes.
        and all(m.stride(-1) == 1 and m.stride(-2) % 4 == m.stride(0) % 4 == 0 for m in (A, B))
        and all(size % 4 == 0 for size in (A.shape[-1], A.shape[-2], B.shape[-2]))
        and not torch.is_autocast_enabled("cpu")
    )


def _concrete(ids: Tensor) -> list[int] | None:
    """The ids as numbers; None where they are not known, or reading them would be an error."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(ids):
        return None
    if isinstance(ids, torch._subclasses.FakeTensor):
        return None
    if ids.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    found: list[int] = ids.tolist()
    return found


def _integers(ids: Sequence[int]) -> list[int]:
    if not isinstance(ids, Iterable):
        raise AdapterError(f"ids: expected integers, one a row of the batch; got {ids!r}.")
    found = []
    for k in ids:
        if isinstance(k, bool) or not hasattr(k, "__index__"):
            raise AdapterError(
                f"ids: expected integers, one a row of the batch; got {k!r}. A Bank's ids(names) "
                "turns names into ids."
            )
        # No tensor holds a larger one: it is out of range in any case.
        found.append(max(-(2**62), min(int(k), 2**62)))
    return found
