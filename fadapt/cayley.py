"""From a vector to a rotation: skew-symmetric matrices, Cayley's transform, and its series.

``vectors [..., r, b (b - 1) / 2]`` are the upper triangles of Q, by rows; a rotation is
``R [..., r, b, b]``: with coefficients ``sum_k c_k Q^k``; without, ``(I - Q) (I + Q)^-1``.

In eager mode a device's own kernels build R and take the gradient back, which saves the vectors
alone (and R, of the exact form): ``kernels/oft_loops.py`` and ``oft_gpu.py``. The plain torch here
is what they must equal, what the compiler sees, and what a transform of ``torch.func``
differentiates.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fadapt._function import applied, direct
from fadapt.kernels.eager import forward_twice, oft_kernels, readable, traced, usable
from fadapt.kernels.oft_ops import Coefficients, series_of, stacked


def rotation(vectors: Tensor, coefficients: Coefficients = None) -> Tensor:
    """R of ``vectors``, in their dtype; differentiable any number of times, by every transform."""
    if traced() or forward_twice():
        return plain(vectors, coefficients)
    return _by_kernels(vectors, coefficients)  # type: ignore[no-any-return]


def rotations(vectors: Sequence[Tensor], coefficients: Coefficients) -> Sequence[Tensor]:
    """:func:`rotation` of several layers' vectors ``[..., r, m]`` of one m, together."""
    looked_at = (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or traced()
    )
    if looked_at or not torch.is_grad_enabled():
        counts = [v.shape[-2] for v in vectors]
        return tuple(rotation(torch.cat(list(vectors), -2), coefficients).split(counts, -3))
    return _several(coefficients, *vectors)  # type: ignore[no-any-return]


def size_of(elements: int) -> int:
    """b, of b (b - 1) / 2; 0 if there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


def skew(vectors: Tensor) -> Tensor:
    """Skew-symmetric ``[..., b, b]`` from its upper triangle ``[..., b (b - 1) / 2]``."""
    size = size_of(vectors.shape[-1])
    upper, _ = _triangles(size, vectors.device)
    flat = vectors.new_zeros(*vectors.shape[:-1], size * size)
    half: Tensor = flat.scatter(-1, upper.expand(vectors.shape), vectors)
    half = half.reshape(*half.shape[:-1], size, size)
    return half - half.mT


def cayley(Q: Tensor) -> Tensor:
    """``(I - Q) (I + Q)^-1``, orthogonal for a skew-symmetric Q ``[..., b, b]``."""
    eye = eye_like(Q)
    if Q.shape[-1] > _solved(Q):
        X = _inverse(eye + Q)
        X = X + X @ (eye - (eye + Q) @ X)  # Newton's step: a large Q loses digits in the halves
        return 2 * X - eye
    if not torch.compiler.is_compiling() and forward_twice():
        return 2 * _inverse(eye + Q) - eye
    R: Tensor = torch.linalg.solve_ex(eye + Q, eye - Q, left=False).result
    return R


def inverses(blocks: Tensor) -> Tensor:
    """Those of any blocks ``[r, b, b]``."""
    if blocks.is_cpu and blocks.shape[-1] > _solved(blocks):
        return torch.stack([torch.linalg.inv(block) for block in blocks])
    inverse: Tensor = torch.linalg.inv(blocks)
    return inverse


def _solved(M: Tensor) -> int:
    """Up to which size matrices are solved whole.

    Of larger ones, a GPU waits for the host, and cannot capture it into a CUDA graph; and on a CPU
    of several threads, MKL's LU of several matrices of more than some 150 does not return (torch
    2.13).
    """
    return 128 if M.is_cpu else 16


def _inverse(M: Tensor) -> Tensor:
    """The inverse of ``[..., b, b]`` whose symmetric part is positive definite, as I + Q's is.

    By halves, with Schur's complement, which such a matrix needs no pivots for.
    """
    size = M.shape[-1]
    if size <= _solved(M):
        inverse: Tensor
        if not torch.compiler.is_compiling() and forward_twice():
            # A jvp of a solve's jvp is half of what it should be (torch 2.13); an inverse's is not.
            inverse = torch.linalg.inv_ex(M).inverse
        else:
            inverse = torch.linalg.solve_ex(M, eye_like(M).expand_as(M)).result
        return inverse
    half = size // 2
    A, B, C, D = (
        M[..., :half, :half],
        M[..., :half, half:],
        M[..., half:, :half],
        M[..., half:, half:],
    )
    inner = _inverse(A)
    left = C @ inner
    corner = _inverse(D - left @ B)
    right = -(inner @ B) @ corner
    top = torch.cat([inner - right @ left, right], -1)
    return torch.cat([top, torch.cat([-(corner @ left), corner], -1)], -2)


def polynomial(X: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``sum_k c_k X^k`` of square matrices ``[..., b, b]``, in about 2 sqrt(degree) products
    (Paterson and Stockmeyer 1973, SIAM J. Comput. 2(1))."""
    degree = len(coefficients) - 1
    step = max(1, math.isqrt(degree))
    powers = [eye_like(X).expand_as(X), X]
    while len(powers) <= step:
        powers.append(powers[-1] @ X)

    def part(k: int) -> Tensor:
        total = coefficients[k * step] * powers[0]
        for c, power in zip(coefficients[k * step + 1 :], powers[1:step], strict=False):
            total = torch.add(total, power, alpha=c)
        return total

    top = degree // step
    if degree == 0:
        return coefficients[0] * powers[0]
    if degree % step == 0:  # the highest part is a number, and its product with a power free
        top -= 1
        total = torch.add(part(top), powers[step], alpha=coefficients[-1])
    else:
        total = part(top)
    for k in reversed(range(top)):
        total = part(k) + total @ powers[step]
    return total


def eye_like(matrices: Tensor) -> Tensor:
    """The identity ``[b, b]``, in the dtype and on the device of ``[..., b, b]``."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _triangles(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle lies in a flat b x b matrix, and its mirror image."""
    rows, cols = torch.triu_indices(size, size, 1, device=device)
    return rows * size + cols, cols * size + rows


def plain(vectors: Tensor, coefficients: Coefficients = None) -> Tensor:
    """:func:`rotation` in plain torch, whatever the device has."""
    Q = skew(vectors)
    return cayley(Q) if coefficients is None else polynomial(Q, coefficients)


def _derivative(X: Tensor, E: Tensor, coefficients: Coefficients) -> Tensor:
    """The derivative of R at X in the direction E."""
    if coefficients is None:
        half = cayley(X) + eye_like(X)
        return half @ E @ half / -2
    # The polynomial of a block-triangular matrix carries its derivative in the corner.
    size = X.shape[-1]
    top, bottom = torch.cat([X, E], -1), torch.cat([torch.zeros_like(X), X], -1)
    return polynomial(torch.cat([top, bottom], -2), coefficients)[..., :size, size:]


def _fold(G: Tensor) -> Tensor:
    """The gradient with respect to the vectors, from that with respect to Q: skew's adjoint."""
    upper, lower = _triangles(G.shape[-1], G.device)
    flat = G.reshape(*G.shape[:-2], G.shape[-1] ** 2)
    return flat.index_select(-1, upper) - flat.index_select(-1, lower)


def _plain_back(vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients) -> Tensor:
    """The gradient with respect to the vectors, from that with respect to R; R itself, of the exact
    form, saves a solve."""
    if coefficients is None:
        R = plain(vectors) if R is None else R
        half = (R + eye_like(R)).mT
        return _fold(half @ g @ half / -2)
    return _fold(_series_back(skew(vectors), g, coefficients))


def _series_back(Q: Tensor, g: Tensor, c: Sequence[float]) -> Tensor:
    """The gradient of ``sum_k c_k Q^k`` with respect to a skew-symmetric Q: but for a symmetric
    part, which Q's own symmetry has no use for.

    Back through Horner's scheme in P = Q^2, ``A_j = A_(j+1) P + c_2j I + c_(2j+1) Q``. P is
    symmetric; its gradient G reaches Q as ``-(G Q + Q G)``, and that folds to what
    ``-(G + G^T) Q`` does: one product for two. In all 4 products for five terms, where autograd
    takes 6.
    """
    if len(c) == 2:
        return c[1] * g
    P, eye, even = Q @ Q, eye_like(Q), len(c) % 2 == 1
    sums: list[Tensor] = []  # A_top, ..., A_1
    for j in range(len(c) // 2 - 1, 0, -1):
        A = torch.add(c[2 * j] * eye, Q, alpha=c[2 * j + 1])
        if sums:
            A = A + sums[-1] @ P
        elif even:
            A = torch.add(A, P, alpha=c[-1])
        sums.append(A)
    of_Q, of_P, moved = c[1] * g, None, g
    for j, A in enumerate(reversed(sums), 1):
        of_P = A.mT @ moved if of_P is None else of_P + A.mT @ moved
        moved = moved @ P
        of_Q = torch.add(of_Q, moved, alpha=c[2 * j + 1])
    if even:
        of_P = c[-1] * moved if of_P is None else torch.add(of_P, moved, alpha=c[-1])
    assert of_P is not None
    return of_Q - (of_P + of_P.mT) @ Q


def _again(vectors: Tensor, g: Tensor, coefficients: Coefficients) -> Tensor:
    """:func:`_plain_back` as a function of the vectors too."""
    return _plain_back(vectors, None, g, coefficients)


class _ByKernels(Function):
    @staticmethod
    def forward(vectors: Tensor, coefficients: Coefficients) -> Tensor:
        kernels = _kernels(coefficients, vectors)
        if kernels is None:
            return plain(vectors, coefficients)
        return kernels.build(vectors, coefficients)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        vectors, ctx.coefficients = inputs
        ctx.save_for_backward(vectors, output if ctx.coefficients is None else None)
        ctx.save_for_forward(vectors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return back_by_kernels(*ctx.saved_tensors, g, ctx.coefficients), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        (vectors,) = ctx.saved_tensors
        return _derivative(skew(vectors), skew(tangent), ctx.coefficients)

    @staticmethod
    def vmap(info: Any, in_dims: Any, vectors: Tensor, coefficients: Coefficients) -> Any:
        return rotation(vectors.movedim(in_dims[0], 0), coefficients), 0


class _BackByKernels(Function):
    """The gradient with respect to the vectors; R is theirs, where the exact form has kept it."""

    @staticmethod
    def forward(vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Coefficients) -> Tensor:
        kernels = _kernels(coefficients, vectors, g)
        if kernels is None:
            return _plain_back(vectors, R, g, coefficients)
        return kernels.build_backward(vectors, R, g, coefficients)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        vectors, _, g, ctx.coefficients = inputs
        ctx.save_for_backward(vectors, g)
        ctx.save_for_forward(vectors, g)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:  # type: ignore[override]
        again = partial(_again, coefficients=ctx.coefficients)
        by_vectors, by_g = torch.func.vjp(again, *ctx.saved_tensors)[1](G)
        return by_vectors, None, by_g, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: Any, tg: Tensor | None, *__: Any) -> Tensor:  # type: ignore[override]
        # By two pullbacks: torch has no jvp inside of forward-mode autograd.
        again = partial(_again, coefficients=ctx.coefficients)
        pulled: Any = torch.func.vjp(again, *ctx.saved_tensors)
        value, pull = pulled
        given = [
            torch.zeros_like(t) if d is None else d
            for t, d in zip(ctx.saved_tensors, (tangent, tg), strict=True)
        ]
        moved: Tensor = torch.func.vjp(pull, torch.zeros_like(value))[1](tuple(given))[0]
        return moved

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, vectors: Tensor, R: Tensor | None, g: Tensor, coefficients: Any
    ) -> Any:
        if R is not None:
            return back_by_kernels(*stacked(info, in_dims, vectors, R, g), coefficients), 0
        vectors, g = stacked(info, (in_dims[0], in_dims[2]), vectors, g)
        return back_by_kernels(vectors, None, g, coefficients), 0


class _Several(Function):
    """One node of autograd for what would be three, which in eager mode cost a GPU's small step
    more than its kernels do."""

    @staticmethod
    def forward(ctx: Any, coefficients: Coefficients, *vectors: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat(vectors, -2)
        R = _ByKernels.forward(flat, coefficients)
        ctx.coefficients, ctx.counts = coefficients, [v.shape[-2] for v in vectors]
        ctx.save_for_backward(flat, R if coefficients is None else None, *vectors)
        return torch.split_with_sizes(R, ctx.counts, -3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        flat, R, *vectors = ctx.saved_tensors
        if torch.is_grad_enabled():
            flat = torch.cat(vectors, -2)
        found = back_by_kernels(flat, R, torch.cat(grads, -3), ctx.coefficients)
        return None, *torch.split_with_sizes(found, ctx.counts, -2)


_by_kernels = applied(_ByKernels)
_several = direct(_Several)
back_by_kernels = applied(_BackByKernels)


def _kernels(coefficients: Coefficients, vectors: Tensor, *others: Tensor) -> Any:
    """The device's kernels, where they take these vectors."""
    if not readable(vectors, *others) or not vectors.numel():
        return None
    if vectors.device.type == "cpu":
        from fadapt.kernels.oft_cpu import loops

        return loops(size_of(vectors.shape[-1]), vectors, *others)
    if not usable(vectors, vectors):
        return None
    gpu = oft_kernels()
    fits = vectors.dtype == torch.float32 and size_of(vectors.shape[-1]) <= gpu.MOST
    return gpu if fits and series_of(coefficients) is not None else None
