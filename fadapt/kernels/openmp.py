"""Compiled loops on the threads that torch itself computes with.

Threads of one's own would wait for torch's, which for some milliseconds after each of its
operations do not sleep. A process whose torch has no such threads to lend (as on Windows) cannot
import this, and does without.
"""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
from numba import types
from numba.np.unsafe.ndarray import to_fixed_tuple
from torch import Tensor

if numba.config.DISABLE_JIT:  # NUMBA_DISABLE_JIT=1
    raise ImportError("numba is told to compile nothing")

# A function that other compiled ones call, and Python does not.
inner = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_process = ctypes.CDLL(None)
_parallel = _process.GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def run(body: Any, threads: int, tensors: Sequence[Tensor | None], *numbers: int) -> None:
    """Run a function of an ``int64`` array, on so many threads; each takes its :func:`share`.

    Args:
        body: what each runs.
        threads: at most :func:`torch.get_num_threads`.
        tensors: the first of its numbers are their addresses, 0 for None. All that a tensor holds
            must lie in it without a gap.
        *numbers: the others.
    """
    places = [0 if t is None else t.data_ptr() for t in tensors]
    data, ready = array("q", [*places, *numbers]), _compiled(body)
    at = data.buffer_info()[0]
    if threads > 1:
        _parallel(ready.address, at, threads, 0)
    else:
        ready.call(at)


@inner
def share(count: int) -> tuple[int, int]:
    """Of so many tasks, those of the thread that asks: from, to."""
    thread, threads = _thread(), _threads()
    return count * thread // threads, count * (thread + 1) // threads


@inner
def thread() -> int:
    """Which thread asks."""
    return _thread()  # type: ignore[no-any-return]


@inner
def unpacked(numbers: Any, count: int) -> Any:
    """So many of the numbers that :func:`run` was given, as a tuple."""
    return to_fixed_tuple(numba.carray(numbers, count), count)


class _Ready(NamedTuple):
    address: int
    call: Any
    made: Any  # which holds the code


@cache
def _compiled(body: Any) -> _Ready:
    """At its first use, which takes a second or two; later processes find it in numba's cache.

    That notices a change of the body's own file, and not one of this.
    """
    kind = types.void(types.CPointer(types.int64))
    try:
        made = numba.cfunc(kind, error_model="numpy", cache=True)(body)
    except RuntimeError:  # no folder to write it to
        made = numba.cfunc(kind, error_model="numpy")(body)
    return _Ready(made.address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(made.address), made)
