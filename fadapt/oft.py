"""OFT, whole: ``y = W (x R) + b``, R block-diagonal and orthogonal (Qiu et al. 2023,
arXiv:2306.07280; with the input rotated as in OFTv2, Qiu et al. 2025, arXiv:2506.19847).

Parameters, hyperparameters, the rotation they stand for, forward, merging: all that OFT is, over
any base.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fadapt.bases import Base
from fadapt.bases.precision import without_autocast
from fadapt.cayley import eye_like, inverses, plain, rotations, size_of
from fadapt.cayley import rotation as by_device
from fadapt.errors import AdapterError, ConfigError
from fadapt.kernels.eager import traced
from fadapt.kernels.oft_ops import turn
from fadapt.kernels.oft_turn import fuses, large, rotate, turn_by
from fadapt.method import ready, to_merge
from fadapt.rows import Rows, keep_base
from fadapt.targets import ALL_LINEAR, normalize_targets

CAYLEY = ("exact", "neumann", "auto")
FORMS = ("own", "peft")
# Of cayley="auto": the truncation error up to which a block is left to the series.
SERIES_TOLERANCE = 1e-3
# Elements of R that a merge builds at a time.
MERGED = 2**16
Build = Callable[[Tensor, tuple[float, ...] | None], Tensor]


class OFTParams(NamedTuple):
    """``oft_R [r, b (b - 1) / 2]``: the upper triangles of r skew-symmetric blocks, by rows; r is 1
    if all blocks share one."""

    oft_R: Tensor


class OFTRotation(NamedTuple):
    """``rotation [r, b, b]``: the blocks of R that :meth:`OFT.prepare` built. A forward takes it in
    place of :class:`OFTParams`."""

    rotation: Tensor


Params = OFTParams | OFTRotation


@dataclass(frozen=True)
class OFT:
    """OFT's hyperparameters.

    Args:
        block_size: b, the size of R's blocks; must divide each layer's input width. 32 by default.
        blocks: instead of it, their number.
        cayley: ``"exact"``, ``R = (I - Q) (I + Q)^-1``; ``"neumann"``, the first ``terms`` terms of
            its series ``I + 2 sum_k (-Q)^k``; or ``"auto"``, the series for each block where its
            error is bounded by 1e-3, else exact.
        terms: of the series, the identity counted: at least 2.
        coft: constrain each block to ``|Q|_F <= eps / sqrt(r)`` (COFT). See :meth:`project`.
        eps: of that constraint.
        block_share: one block of parameters for all.
        dropout: probability that a block of R is replaced by the identity, in [0, 1). It acts only
            in a forward that is given ``dropout=``.
        form: ``"own"``, or ``"peft"`` for parameters that PEFT trained. They differ with
            ``cayley="neumann"`` alone: PEFT's series is ``I + 2 sum_k Q^k`` with 1 for the last
            power's coefficient, which rotates the other way.
        targets, exclude, layers_to_transform, layers_pattern, modules_to_save, bias: as
            :class:`fadapt.LoRA`.
        dtype: of the parameters; None means float32 (float64 over a float64 base).

    Raises:
        ConfigError: a value out of range, or both of block_size and blocks.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(8, 3), fadapt.OFT(block_size=4)
        >>> params = fadapt.init(method, model)
        >>> params[""].oft_R.shape
        torch.Size([2, 6])
        >>> forward, x = fadapt.bind(model, method), torch.ones(2, 8)
        >>> torch.equal(forward(params, x), model(x))
        True
    """

    block_size: int | None = None
    blocks: int | None = None
    cayley: str = "exact"
    terms: int = 5
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    dropout: float = 0.0
    form: str = "own"
    targets: str | Sequence[str] = ALL_LINEAR
    exclude: str | Sequence[str] = ()
    layers_to_transform: Sequence[int] = ()
    layers_pattern: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    dtype: torch.dtype | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        normalize_targets(self)
        if self.block_size is None and self.blocks is None:
            object.__setattr__(self, "block_size", 32)
        if self.block_size is not None and self.blocks is not None:
            raise ConfigError(
                f"block_size={self.block_size} and blocks={self.blocks} say the same thing twice: "
                "blocks x block_size is the layer's input width. Give one of them."
            )
        for name, least in (("block_size", 2), ("blocks", 1), ("terms", 2)):
            value = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
            if value is not None and wrong:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name, known in (("cayley", CAYLEY), ("form", FORMS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}."
                )
        if self.form == "peft" and self.cayley == "auto":
            raise ConfigError(
                "form='peft' with cayley='auto': PEFT's series rotates the other way than its "
                "exact form, so a block may not switch from one to the other."
            )
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ConfigError(f"eps must be positive and finite, got {self.eps!r}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}.")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(f"dtype must be a floating-point dtype, got {self.dtype}.")

    @property
    def params_type(self) -> type[OFTParams]:
        """The NamedTuple of one layer's parameters."""
        return OFTParams

    @property
    def prepared_type(self) -> type[OFTRotation]:
        """The NamedTuple that :meth:`prepare` makes of it."""
        return OFTRotation

    def at(self, paths: Sequence[str]) -> dict[str, "OFT"]:
        """The hyperparameters of each layer: the same for all."""
        return dict.fromkeys(paths, self)

    def init_layer(self, base: Base, generator: torch.Generator | None) -> tuple[OFTParams, None]:
        """One layer's fresh parameters, zeros: no number is drawn."""
        width = base.in_features
        size = self.block_size or width // (self.blocks or 1)
        if size < 2 or width % size or (self.blocks and width % self.blocks):
            what = f"blocks={self.blocks}" if self.blocks else f"block_size={size}"
            sizes = [d for d in range(2, min(width, 1024) + 1) if width % d == 0]
            raise ConfigError(
                f"{what} does not divide the {width} inputs of a layer into equal blocks of at "
                f"least 2. Block sizes that do: {sizes[:16]}."
            )
        dtype = self.dtype or (torch.float64 if base.dtype == torch.float64 else torch.float32)
        rows = 1 if self.block_share else width // size
        return OFTParams(
            torch.zeros(rows, size * (size - 1) // 2, dtype=dtype, device=base.device)
        ), None

    def check(self, base: Base, params: Any, path: str) -> None:
        """Raise AdapterError unless ``params`` fits the layer. Any block size will do."""
        fields = getattr(params, "_fields", None)
        if fields not in (OFTParams._fields, OFTRotation._fields):
            raise AdapterError(
                f"layer {path!r}: expected OFTParams {OFTParams._fields} or what OFT.prepare made "
                f"of them, got {type(params).__name__}. Make parameters with fadapt.init or "
                "fadapt.load_peft."
            )
        (tensor,) = params
        prepared, width = fields == OFTRotation._fields, base.in_features
        size = tensor.shape[-1] if prepared else size_of(tensor.shape[-1] if tensor.dim() else 0)
        rows = tensor.shape[0] if tensor.dim() else 0
        wanted = 1 if self.block_share else width // size if size else 0
        if (
            tensor.dim() != (3 if prepared else 2)
            or size < 2
            or width % size
            or rows != wanted
            or (prepared and tensor.shape[-2] != size)
        ):
            shape = "[r, b, b]" if prepared else "[r, b (b - 1) / 2]"
            number = "r = 1 (block_share)" if self.block_share else f"r = {width} / b"
            hint = ""
            if tensor.dim() == (4 if prepared else 3):
                hint = " A stack goes through torch.func.vmap(forward, (0, ...))."
            raise AdapterError(
                f"layer {path!r}: expected {fields[0]} {shape} with {number}, got "
                f"{list(tensor.shape)}.{hint}"
            )
        if not tensor.dtype.is_floating_point:
            raise AdapterError(f"layer {path!r}: {fields[0]} must be floating, got {tensor.dtype}.")

    def keep_shape(self, params: Params, x: Tensor) -> torch.Size:
        """Of dropout's mask: one element a block."""
        width = x.shape[-1]
        return torch.Size([width // _block_size(params)])

    def prepare(
        self, params: Mapping[str, Any], bases: Mapping[str, Base] | None = None
    ) -> dict[str, Any]:
        """Build R of every layer, all layers of one block size together.

        Each forward does that by itself. A caller that runs several with the same parameters
        (micro-batches, generation) does it once: R can be a leaf across them, its gradients be
        added up, and one vector-Jacobian product a step bring them to the parameters.

        Args:
            params: an adapter, ``{path: OFTParams}``; other leaves are passed on.
            bases: not read.

        Returns:
            ``{path: OFTRotation}``, which a forward takes in place of ``params``.
        """
        return self._prepared(params, [])

    def _prepared(self, params: Mapping[str, Any], left: Container[str]) -> dict[str, Any]:
        """All but the layers that are ``left`` as they are."""
        prepared = dict(params)
        groups: dict[Any, list[str]] = {}
        for path, leaf in params.items():
            if isinstance(leaf, OFTParams) and path not in left:
                t = leaf.oft_R
                key = t.shape[-1], t.dtype, t.device, path if large(t) else None
                groups.setdefault(key, []).append(path)
        for paths in groups.values():
            if len(paths) == 1:
                prepared[paths[0]] = OFTRotation(self.rotation(params[paths[0]]))
                continue
            blocks = self._together([self._constrained(params[path].oft_R) for path in paths])
            prepared |= {p: OFTRotation(block) for p, block in zip(paths, blocks, strict=True)}
        return prepared

    def rotation(self, params: Params) -> Tensor:
        """R of one layer, ``[..., r, b, b]`` in the parameters' dtype; R x R^T = I if exact."""
        if isinstance(params, OFTRotation):
            return params.rotation
        return self._build(self._constrained(params.oft_R))

    def orthogonality_error(self, params: Mapping[str, Any]) -> dict[str, Tensor]:
        """``{path: max over the blocks of |R R^T - I|_F}``, each ``[]``: 0 is a rotation."""
        errors = {}
        for path, leaf in self.prepare(params).items():
            if isinstance(leaf, OFTRotation):
                blocks = leaf.rotation.to(_wide(leaf.rotation))
                gram = blocks @ blocks.mT - eye_like(blocks)
                errors[path] = gram.flatten(-2).norm(dim=-1).amax(-1)
        return errors

    def project(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The adapter with every block inside COFT's constraint: pure, and idempotent.

        A forward with ``coft=True`` sees the parameters through this projection, and its gradient
        is that of the projection too. Projected gradient descent, which is what PEFT does by
        writing into the parameter, is to call this after each step of the optimiser.
        """
        return {
            path: OFTParams(_project(leaf.oft_R, self.eps)) if isinstance(leaf, OFTParams) else leaf
            for path, leaf in params.items()
        }

    def apply(self, base: Base, params: Params, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``W (x R) + b`` for x ``[..., in]``: ``[..., out]`` in the base's result dtype.

        Args:
            base: the frozen layer.
            params: its parameters, or the rotation prepared from them; x is rotated in their dtype.
            x: ``[..., in]``.
            keep: boolean ``[in / b]``: which blocks dropout lets rotate.
        """
        if keep is None and isinstance(params, OFTParams) and self.cayley != "auto":
            vectors = self._constrained(params.oft_R)
            turned = turn_by(x, vectors, self._coefficients)
            return base.linear(rotate(x, self._build(vectors)) if turned is None else turned)
        blocks = self.rotation(params)
        if keep is not None:
            blocks = torch.where(keep[:, None, None], blocks, eye_like(blocks))
        return base.linear(rotate(x, blocks))

    def apply_rows(self, base: Base, params: OFTRotation, rows: Rows, x: Tensor) -> Tensor:
        """:meth:`apply` with leaves ``[K, ...]`` and x ``[n, ..., in]``: a row, its adapter."""
        turned = rotate(x, rows.pick(params.rotation))
        return base.linear(keep_base(turned, x, rows))

    def merge(self, weight: Tensor, params: Params, rows: slice = slice(None)) -> Tensor:
        """``W R^T``, for the rows ``rows`` of W that ``weight [rows, in]`` holds.

        Computed and returned in the wider of the two dtypes, float32 at least.
        """
        blocks, weight = self._wide_pair(weight, params)
        return turn(weight, blocks.mT)

    def unmerge(self, weight: Tensor, params: Params, rows: slice = slice(None)) -> Tensor:
        """``W R^-T``: the inverse of :meth:`merge`, up to rounding, orthogonal or not."""
        blocks, weight = self._wide_pair(weight, params)
        if self.cayley == "exact" and isinstance(params, OFTParams):
            return turn(weight, blocks)
        return turn(weight, inverses(blocks.mT))

    def merge_bias(self, bias: Tensor | None, params: Params) -> Tensor | None:
        """``b``: a rotation of the input leaves it alone."""
        return bias

    def unmerge_bias(self, bias: Tensor | None, params: Params) -> Tensor | None:
        """``b`` as well."""
        return bias

    def _wide_pair(self, weight: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        blocks = self.rotation(_widened(params))
        kind = torch.promote_types(blocks.dtype, weight.dtype)
        return blocks.to(kind), weight.to(kind)

    def _constrained(self, vectors: Tensor) -> Tensor:
        return _project(vectors, self.eps) if self.coft else vectors

    def _build(self, vectors: Tensor, build: Build = by_device) -> Tensor:
        """``[..., r, b (b - 1) / 2] -> [..., r, b, b]``; in float32 at least, whatever autocast."""
        with without_autocast(vectors):
            kind = _wide(vectors)
            wide = vectors if vectors.dtype == kind else vectors.to(kind)
            if self.cayley == "auto":
                blocks = self._either(wide, build)
            else:
                blocks = build(wide, self._coefficients)
        return blocks if blocks.dtype == vectors.dtype else blocks.to(vectors.dtype)

    def _together(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """:meth:`_build` of several layers' vectors."""
        if self.cayley == "auto" or vectors[0].dtype != _wide(vectors[0]):
            counts = [v.shape[-2] for v in vectors]
            return tuple(self._build(torch.cat(list(vectors), -2)).split(counts, -3))
        with without_autocast(vectors[0]):
            return rotations(vectors, self._coefficients)

    @property
    def _coefficients(self) -> tuple[float, ...] | None:
        return None if self.cayley == "exact" else self._series()

    def _series(self) -> tuple[float, ...]:
        if self.form == "own":
            return (1.0, *(2.0 * (-1) ** k for k in range(1, self.terms)))
        # As oft/layer.py of PEFT 0.18 and later, where 3 and 4 terms are one thing.
        return (1.0, 2.0, *[2.0] * (max(self.terms, 4) - 3), 1.0) if self.terms > 2 else (1.0, 2.0)

    def _either(self, vectors: Tensor, build: Build) -> Tensor:
        # Q's eigenvalues come in pairs +-i t, so the largest t is at most |Q|_F / sqrt(2), the norm
        # of the vector, and what the series leaves out is at most 2 t^terms.
        square = vectors.detach().square().sum(-1)
        converges = square <= (SERIES_TOLERANCE / 2) ** (2 / self.terms)
        if not (torch._C._are_functorch_transforms_active() or traced()):
            if bool(converges.all()):
                return build(vectors, self._series())
            if not bool(converges.any()):
                return build(vectors, None)
        # The series of a block that is left to the exact form could overflow, and the gradient of
        # a branch that is not taken is 0 x that.
        small = torch.where(converges[..., None], vectors, 0.0)
        series = build(small, self._series())
        return torch.where(converges[..., None, None], series, build(vectors, None))


@ready.register
def _(method: OFT, params: Mapping[str, Any], bases: Mapping[str, Base]) -> dict[str, Any]:
    # A large layer on a CPU, which gains nothing by others beside it, builds R with its rotation;
    # and so does a series on a GPU, which for few rows is summed where it rotates.
    own = method.cayley == "neumann" and not method.block_share and method.dropout == 0
    series = method._coefficients if own else None
    left = {
        path
        for path, at in params.items()
        if isinstance(at, OFTParams) and (large(at.oft_R) or fuses(at.oft_R, series))
    }
    return method._prepared(params, left)


@to_merge.register
def _(method: OFT, params: Mapping[str, Any], bases: Mapping[str, Base]) -> dict[str, Any]:
    # In plain torch, a few blocks at a time: to compile loops takes more memory than a merge, and
    # more time than one gains by them.
    merged = dict(params)
    for path, leaf in params.items():
        if isinstance(leaf, OFTParams):
            vectors = method._constrained(leaf.oft_R)
            some = max(1, MERGED // size_of(vectors.shape[-1]) ** 2)
            parts = [method._build(part, plain) for part in vectors.split(some)]
            merged[path] = OFTRotation(torch.cat(parts))
    return merged


def _project(vectors: Tensor, eps: float) -> Tensor:
    # |Q|_F^2 is twice the sum over the upper triangle. The slack keeps what lies on the border,
    # up to rounding, as it is: with a gradient in every direction.
    square = 2 * vectors.square().sum(-1, keepdim=True)
    bound = eps / math.sqrt(vectors.shape[-2])
    outside = square > bound**2 * (1 + 1e-5)
    return vectors * torch.where(outside, bound * torch.where(outside, square, 1.0).rsqrt(), 1.0)


def _block_size(params: Params) -> int:
    (tensor,) = params
    return tensor.shape[-1] if isinstance(params, OFTRotation) else size_of(tensor.shape[-1])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _widened(params: Params) -> Params:
    (tensor,) = params
    return type(params)(tensor.to(_wide(tensor)))
