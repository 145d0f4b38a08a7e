"""A bank of adapters by name, for as long as a server lives.

Each adapter is one row of a matrix that is allocated once, so adding one writes that row alone:
nothing is compiled or captured again, and no other adapter is copied. More adapters than rows are
kept on the host, and paged in by one copy each (S-LoRA, Sheng et al. 2023, arXiv:2311.03285).
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.errors import AdapterError, ConfigError, near
from fadapt.kinds import Kinds
from fadapt.shelf import Shelf, rooms_for, shelf_of

BASE_NAME = "base"


class _Slot:
    """A row that some version of the bank holds; given back when no version does."""

    __slots__ = ("__weakref__", "index")

    def __init__(self, index: int):
        self.index = index


class _Pool:
    """The rows of one kind's adapters, shared by all versions of a bank.

    Only a row that no version holds is ever written, except in paging, where a version whose row
    was taken is told so: ``owner`` is no longer its slot.
    """

    def __init__(self, shelf: Shelf, size: int, dtype: torch.dtype, device: torch.device):
        self.rows = torch.zeros(size, shelf.width, dtype=dtype, device=device)
        self.owner: dict[int, weakref.ref[_Slot]] = {}

    def take(self) -> _Slot | None:
        free = (i for i in range(self.rows.shape[0]) if not self._held(i))
        index = next(free, None)
        return None if index is None else self.seize(index)

    def seize(self, index: int) -> _Slot:
        slot = _Slot(index)
        self.owner[index] = weakref.ref(slot)
        return slot

    def owned(self, slot: _Slot) -> bool:
        ref = self.owner.get(slot.index)
        return ref is not None and ref() is slot

    def _held(self, index: int) -> bool:
        ref = self.owner.get(index)
        return ref is not None and ref() is not None


@dataclass(frozen=True, eq=False)
class _Entry:
    shelf: int
    slot: _Slot | None
    host: Tensor | None  # its row on the host, where the bank pages


@dataclass(frozen=True, eq=False)
class Bank:
    """Adapters by name; every method returns a new bank, and leaves this one as it is.

    All versions of a bank share its rows: add and page from one thread at a time.

    Made by :meth:`of` or :meth:`holding`. Run it with ``fadapt.bind_mixed(model, bank.method)``:
    ``mixed(bank.params, bank.ids(names), *inputs)``.

    Attributes:
        method: what ``bind_mixed`` takes.
        params: what ``mixed`` takes: leaves ``[capacity, ...]``, a tuple of such stacks if the bank
            holds several methods. The same tensors for all versions of the bank, until it grows: a
            graph captured over them, ``fadapt.cuda_graph(lambda ids, x: mixed(params, ids, x), ids,
            x)``, runs what is added or paged in later.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2)
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> bank = fadapt.Bank.of(model, fadapt.LoRA(rank=8), capacity=4)
        >>> bank = bank.add("alice", params, method)
        >>> bank.ids(["base", "alice"])
        [-1, 0]
        >>> mixed = fadapt.bind_mixed(model, bank.method)
        >>> mixed(bank.params, bank.ids(["base", "alice"]), torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    method: Any
    params: Any
    _shelves: tuple[Shelf, ...]
    _pools: tuple[_Pool, ...]
    _paged: bool
    _entries: Mapping[str, _Entry] = field(default_factory=dict)  # least recently used first

    @classmethod
    def of(
        cls,
        model: nn.Module,
        methods: Any,
        *,
        capacity: int | Sequence[int] = 8,
        paged: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> "Bank":
        """An empty bank.

        Args:
            model: only read.
            methods: one, or a list of several. Of LoRA: the largest rank (by layer), and all
                targets that any adapter will have; alphas are free. Of others: what each adapter's
                method will be.
            capacity: how many adapters of each method there is room for on the device; a number
                for all methods, or one for each.
            paged: keep every adapter on the host, and page ``capacity`` of them in: see
                :meth:`page`. Otherwise the bank grows when it is full, to twice its capacity: then
                a compiled or captured forward is made again.
            dtype: of the adapters in the bank.

        Raises:
            ConfigError: a capacity below 1, no method, modules saved whole.
            TargetError: targets and layers do not meet.
        """
        each = tuple(methods) if isinstance(methods, Sequence) else (methods,)
        sizes = list(capacity) if isinstance(capacity, Sequence) else [capacity] * len(each)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise ConfigError(f"capacity must be an integer of at least 1, got {capacity!r}.")
        if not each or len(sizes) != len(each):
            raise ConfigError(
                f"a bank needs at least one method, and a capacity for each: got {len(each)} "
                f"methods and {len(sizes)} capacities."
            )
        shelves = tuple(shelf_of(method, model) for method in each)
        pools = tuple(_Pool(s, n, dtype, s.device) for s, n in zip(shelves, sizes, strict=True))
        units = tuple(shelf.unit for shelf in shelves)
        method = units[0] if len(units) == 1 else Kinds(units)
        return cls(method, _params(shelves, pools), shelves, pools, paged)

    @classmethod
    def holding(
        cls,
        model: nn.Module,
        adapters: Mapping[str, tuple[Mapping[str, Any], Any]],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "Bank":
        """A bank of these adapters, with room for no larger ones.

        Args:
            model: only read.
            adapters: ``{name: (params, method)}``, as :func:`fadapt.load_peft` returns them; their
                ranks, alphas, targets and methods may differ.
            dtype: of the adapters in the bank.

        Raises:
            AdapterError: no adapters, no pair, a name that cannot be one, or modules saved whole.
            TargetError: an adapter's layers are not the model's.
        """
        for name, pair in adapters.items():
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise AdapterError(
                    f"adapter {name!r}: expected (params, method), got a {type(pair).__name__}."
                )
        rooms = rooms_for(adapters.values())
        if not rooms:
            raise AdapterError("a bank needs at least one adapter, and one with a layer.")
        methods, counts = zip(*rooms, strict=True)
        bank = cls.of(model, methods, capacity=counts, dtype=dtype)
        for name, (params, method) in adapters.items():
            bank = bank.add(name, params, method)
        return bank

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        rooms = [
            f"{pool.rows.shape[0]} of {type(shelf.unit).__name__} on {len(shelf.bases)} layers"
            for shelf, pool in zip(self._shelves, self._pools, strict=True)
        ]
        return f"Bank({len(self)} adapters, room for {', '.join(rooms)})"

    @property
    def names(self) -> list[str]:
        """Of all adapters, the least recently used first."""
        return list(self._entries)

    @property
    def resident(self) -> list[str]:
        """Of those that are on the device."""
        return [name for name, entry in self._entries.items() if self._here(entry)]

    def add(self, name: str, params: Mapping[str, Any], method: Any) -> "Bank":
        """The bank with one adapter more.

        Args:
            name: a new one, not ``"base"``.
            params: the adapter.
            method: that it was made with. A LoRA of lower rank is padded, its scaling folded into
                B, and a layer that it lacks is left alone.

        Raises:
            AdapterError: the name is taken, or no method of the bank has room for such an adapter.
        """
        if not isinstance(name, str) or not name or name == BASE_NAME:
            raise AdapterError(
                f"an adapter cannot be called {name!r}: give it a name of its own; 'base' is the "
                "model without an adapter."
            )
        if name in self._entries:
            raise AdapterError(f"the bank has an adapter {name!r}: remove it first.")
        reasons = []
        for k, shelf in enumerate(self._shelves):
            reason = shelf.refuses(params, method)
            if reason is None:
                return self._put(name, k, shelf.row(params, method))
            reasons.append(reason)
        raise AdapterError(f"adapter {name!r} does not fit this bank: {'; '.join(reasons)}.")

    def remove(self, name: str) -> "Bank":
        """The bank without this adapter. Its place is used again once no older bank needs it.

        Raises:
            AdapterError: there is none of this name.
        """
        if name == BASE_NAME:
            raise AdapterError("'base' is the model without an adapter: it is in every bank.")
        self._find([name])
        rest = {n: entry for n, entry in self._entries.items() if n != name}
        return replace(self, _entries=rest)

    def ids(self, names: Iterable[str]) -> list[int]:
        """What ``mixed`` takes: one id a name, -1 for ``"base"``.

        Raises:
            AdapterError: a name that the bank does not have, or an adapter that is on the host.
        """
        names = listed(names)
        self._find(names)
        starts, total = [], 0
        for pool in self._pools:
            starts.append(total)
            total += pool.rows.shape[0]
        found = []
        for name in names:
            if name == BASE_NAME:
                found.append(-1)
                continue
            entry = self._entries[name]
            if entry.slot is None or not self._here(entry):
                raise AdapterError(
                    f"adapter {name!r} is on the host: `bank = bank.page(names)` brings it in."
                )
            found.append(starts[entry.shelf] + entry.slot.index)
        return found

    def page(self, names: Iterable[str]) -> "Bank":
        """The bank with these adapters on the device, in place of the least recently used.

        A copy of one row for each that was not there. An older bank that held an adapter whose
        place is taken says so when asked for its id.

        Raises:
            AdapterError: an unknown name, or more names than there are places.
        """
        wanted = [n for n in dict.fromkeys(listed(names)) if n != BASE_NAME]
        self._find(wanted)
        entries = {n: e for n, e in self._entries.items() if n not in wanted}
        for k, pool in enumerate(self._pools):
            mine = [n for n in wanted if self._entries[n].shelf == k]
            if len(mine) > pool.rows.shape[0]:
                raise AdapterError(
                    f"{len(mine)} adapters at once, and room for {pool.rows.shape[0]}: split the "
                    "batch, or make the bank's capacity larger."
                )
        # Those that are there first: their places are not to be taken.
        here = {n: e for n in wanted if self._here(e := self._entries[n])}
        for name in wanted:
            entry = here.get(name) or self._bring(self._entries[name], entries, here)
            here[name] = entry
        return replace(self, _entries=entries | {n: here[n] for n in wanted})

    def _bring(
        self, entry: _Entry, others: dict[str, _Entry], pinned: Mapping[str, _Entry]
    ) -> _Entry:
        assert entry.host is not None  # without paging every adapter is on the device
        pool = self._pools[entry.shelf]
        slot = pool.take()
        if slot is None:
            kept = {e.slot.index for e in pinned.values() if e.slot and e.shelf == entry.shelf}
            oldest = [
                e.slot.index
                for e in others.values()
                if e.shelf == entry.shelf and e.slot and self._here(e)
            ]
            # Rows of older versions alone come first: this one does not need them.
            free = [i for i in range(pool.rows.shape[0]) if i not in kept and i not in oldest]
            slot = pool.seize((free + oldest)[0])
        _write(pool, slot, entry.host)
        return replace(entry, slot=slot)

    def _put(self, name: str, k: int, row: Tensor) -> "Bank":
        if self._paged:
            pinned = row.to("cpu", self._pools[k].rows.dtype)
            if self._pools[k].rows.is_cuda:
                pinned = pinned.pin_memory()
            return replace(self, _entries={name: _Entry(k, None, pinned), **self._entries})
        bank, slot = self, self._pools[k].take()
        if slot is None:
            bank = self._grown(k)
            slot = bank._pools[k].take()
            assert slot is not None
        _write(bank._pools[k], slot, row)
        return replace(bank, _entries={**bank._entries, name: _Entry(k, slot, None)})

    def _grown(self, k: int) -> "Bank":
        old = self._pools[k]
        size = old.rows.shape[0]
        new = _Pool(self._shelves[k], 2 * size, old.rows.dtype, old.rows.device)
        new.rows[:size].copy_(old.rows)
        entries = {
            name: replace(entry, slot=new.seize(entry.slot.index))
            if entry.shelf == k and entry.slot
            else entry
            for name, entry in self._entries.items()
        }
        pools = tuple(new if i == k else pool for i, pool in enumerate(self._pools))
        params = _params(self._shelves, pools)
        return replace(self, params=params, _pools=pools, _entries=entries)

    def _here(self, entry: _Entry) -> bool:
        return entry.slot is not None and self._pools[entry.shelf].owned(entry.slot)

    def _find(self, names: Iterable[str]) -> None:
        for name in names:
            if name != BASE_NAME and name not in self._entries:
                hint = near(str(name), [*self._entries, BASE_NAME])
                raise AdapterError(
                    f"the bank has no adapter {name!r}.{hint} It has {len(self)}; 'base' is "
                    "the model without an adapter."
                )


def listed(names: Iterable[str]) -> list[str]:
    """Names as a list; one string is no list of its letters."""
    if isinstance(names, str):
        raise AdapterError(f"expected a list of names, one a row; got the string {names!r}.")
    return list(names)


def _write(pool: _Pool, slot: _Slot, row: Tensor) -> None:
    with torch.no_grad():
        pool.rows[slot.index].copy_(row, non_blocking=True)


def _params(shelves: Sequence[Shelf], pools: Sequence[_Pool]) -> Any:
    each = tuple(shelf.leaves(pool.rows) for shelf, pool in zip(shelves, pools, strict=True))
    return each[0] if len(each) == 1 else each
