"""From a vector to a rotation: skew-symmetric matrices, Cayley's transform, and its series.

``vectors [..., r, b (b - 1) / 2]`` are the upper triangles of Q, by rows; a rotation is
``R [..., r, b, b]``: with coefficients ``sum_k c_k Q^k``; without, ``(I - Q) (I + Q)^-1``.

Of many adapters, R is small work over much memory. So on a CPU it is built a few blocks at a time,
which stay in the cache from one operation to the next, and built again in the backward, which saves
the vectors alone (and R, of the exact form): up to twice as fast. On a GPU one kernel builds R and
one takes the gradient back (``kernels/oft_gpu.py``); without Triton, and in what a transform of
``torch.func`` differentiates, the same operations run once over all blocks, and the exact form is
an inverse made of products, whose derivative is R's own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fadapt._function import applied
from fadapt.bases.op import is_batched
from fadapt.kernels.eager import oft_kernels, readable, usable

Coefficients = tuple[float, ...] | None
# Of all of R, from where on; and at a time (measured: 32 to 128 blocks of 32 x 32 are alike).
_LARGE_BYTES = 2**22
_CHUNK_BYTES = 2**18


def rotation(vectors: Tensor, coefficients: Coefficients = None) -> Tensor:
    """R of ``vectors``, in their dtype; differentiable any number of times, by every transform."""
    if torch.compiler.is_compiling():
        return _plain(vectors, coefficients)
    level = torch._C._functorch.peek_interpreter_stack()
    # Unwrapped by vmap, the stack of them comes here again; any other transform wants the
    # derivative of the plain form.
    once = level is None or level.key() == torch._C._functorch.TransformType.Vmap
    if vectors.device.type != "cpu":
        blockwise = once or coefficients is None
    elif level is None:
        blockwise = 2 * vectors.numel() * vectors.element_size() > _LARGE_BYTES
    else:
        blockwise = once
    if blockwise:
        return _blockwise(vectors, coefficients)  # type: ignore[no-any-return]
    return _plain(vectors, coefficients)


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
    if Q.device.type != "cpu":
        X = _inverse(eye + Q)
        X = X + X @ (eye - (eye + Q) @ X)  # Newton's step: a large Q loses digits in the halves
        return 2 * X - eye
    R: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
    return R


def _inverse(M: Tensor) -> Tensor:
    """The inverse of ``[..., b, b]`` whose symmetric part is positive definite, as I + Q's is.

    By halves, with Schur's complement, which such a matrix needs no pivots for. A solve of larger
    blocks makes a GPU wait for the host, and cannot be captured into a CUDA graph.
    """
    size = M.shape[-1]
    if size <= 16:
        inverse: Tensor = torch.linalg.solve_ex(M, eye_like(M).expand_as(M)).result
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


def _plain(vectors: Tensor, coefficients: Coefficients) -> Tensor:
    Q = skew(vectors)
    return cayley(Q) if coefficients is None else polynomial(Q, coefficients)


def _derivative(X: Tensor, E: Tensor, coefficients: Coefficients) -> Tensor:
    """The derivative of R at X in the direction E; at X^T, its adjoint."""
    if coefficients is None:
        half = cayley(X) + eye_like(X)
        return half @ E @ half / -2
    # The polynomial of a block-triangular matrix carries its derivative in the corner.
    size = X.shape[-1]
    top, bottom = torch.cat([X, E], -1), torch.cat([torch.zeros_like(X), X], -1)
    return polynomial(torch.cat([top, bottom], -2), coefficients)[..., :size, size:]


def _horner(
    Q: Tensor, P: Tensor, coefficients: tuple[float, ...], least: int = 0
) -> dict[int, Tensor]:
    """``sum_k c_k Q^k`` by Horner in P = Q^2: ``A_j = A_(j+1) P + c_2j + c_(2j+1) Q``, j down to
    ``least``; A_0 is the sum. Of an even degree, A_top is a number, and left out."""
    degree = len(coefficients) - 1
    factors: dict[int, Tensor] = {}
    for j in range((degree - 1) // 2, least - 1, -1):
        A = coefficients[2 * j + 1] * Q
        A.diagonal(dim1=-2, dim2=-1).add_(coefficients[2 * j])
        if j + 1 in factors:
            A.baddbmm_(factors[j + 1], P)
        elif 2 * j + 2 == degree:
            A.add_(P, alpha=coefficients[-1])
        factors[j] = A
    return factors


def _pulled_back(Q: Tensor, g: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The gradient of ``sum_k c_k Q^k`` with respect to a skew-symmetric Q, as :func:`_fold` wants
    it: but for a symmetric part, which Q's own symmetry has no use for.

    Back through :func:`_horner`. P is symmetric; its gradient G reaches Q as ``-(G Q + Q G)``, and
    that folds to what ``-(G + G^T) Q`` does: one product for two. In all 4 products for five terms,
    where autograd takes 6.
    """
    E = coefficients[1] * g
    if len(coefficients) == 2:
        return E
    P = Q @ Q
    factors, moved, of_square = _horner(Q, P, coefficients, least=1), g, None
    for j in range(1, (len(coefficients) - 1) // 2 + 1):
        here = factors[j].mT @ moved if j in factors else coefficients[-1] * moved
        of_square = here if of_square is None else of_square.add_(here)
        if j in factors:
            moved = moved @ P
            E.add_(moved, alpha=coefficients[2 * j + 1])
    assert of_square is not None
    return E.baddbmm_(of_square + of_square.mT, Q, alpha=-1)


def _fold(G: Tensor) -> Tensor:
    """The gradient with respect to the vectors, from that with respect to Q: skew's adjoint."""
    upper, lower = _triangles(G.shape[-1], G.device)
    flat = G.reshape(*G.shape[:-2], G.shape[-1] ** 2)
    return flat.index_select(-1, upper) - flat.index_select(-1, lower)


class _Blockwise(Function):
    @staticmethod
    def forward(vectors: Tensor, coefficients: Coefficients) -> Tensor:
        size = size_of(vectors.shape[-1])
        if vectors.device.type != "cpu":
            gpu = _kernels(vectors, coefficients)
            if gpu is None:
                return _plain(vectors, coefficients)
            return gpu.build(vectors, coefficients)  # type: ignore[no-any-return]
        out = vectors.new_empty(*vectors.shape[:-1], size, size)
        flat, rows = out.view(-1, size, size), vectors.reshape(-1, vectors.shape[-1])
        for start, stop in _chunks(flat):
            Q = skew(rows[start:stop])
            R = cayley(Q) if coefficients is None else _horner(Q, Q @ Q, coefficients)[0]
            flat[start:stop] = R
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        vectors, ctx.coefficients = inputs
        ctx.save_for_backward(vectors, output if ctx.coefficients is None else None)
        ctx.save_for_forward(vectors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        vectors, R = ctx.saved_tensors
        if g.device.type != "cpu" and not torch.is_grad_enabled() and not is_batched(g):
            gpu = _kernels(vectors, ctx.coefficients)
            if gpu is not None:
                return gpu.build_backward(vectors, R, g, ctx.coefficients), None
        if R is not None and g.device.type != "cpu":
            half = (R + eye_like(R)).mT
            return _fold(half @ g @ half / -2), None
        # A derivative of this derivative is wanted, or many at once by torch.autograd's own vmap.
        if torch.is_grad_enabled() or is_batched(g) or g.device.type != "cpu":
            return _fold(_derivative(skew(vectors).mT, g, ctx.coefficients)), None
        out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        flat, rows = out.view(-1, out.shape[-1]), vectors.reshape(-1, out.shape[-1])
        G = g.reshape(-1, *g.shape[-2:])
        for start, stop in _chunks(G):
            if R is not None:
                half = (R.view(G.shape)[start:stop] + eye_like(R)).mT
                E = half @ G[start:stop] @ half / -2
            else:
                E = _pulled_back(skew(rows[start:stop]), G[start:stop], ctx.coefficients)
            flat[start:stop] = _fold(E)
        return out, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        (vectors,) = ctx.saved_tensors
        return _derivative(skew(vectors), skew(tangent), ctx.coefficients)

    @staticmethod
    def vmap(info: Any, in_dims: Any, vectors: Tensor, coefficients: Coefficients) -> Any:
        return rotation(vectors.movedim(in_dims[0], 0), coefficients), 0


_blockwise = applied(_Blockwise)


def _kernels(vectors: Tensor, coefficients: Coefficients) -> Any:
    """The GPU's kernels, where they take these vectors."""
    if not usable(vectors, vectors) or not readable(vectors) or not vectors.numel():
        return None
    gpu = oft_kernels()
    fits = vectors.dtype == torch.float32 and size_of(vectors.shape[-1]) <= gpu.MOST
    return gpu if fits and gpu.form_of(coefficients) is not None else None


def _chunks(blocks: Tensor) -> list[tuple[int, int]]:
    count, size, _ = blocks.shape
    step = max(1, _CHUNK_BYTES // (size * size * blocks.element_size()))
    return [(start, min(start + step, count)) for start in range(0, count, step)]
