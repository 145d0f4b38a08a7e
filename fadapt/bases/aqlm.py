"""AQLM: weights as sums of codebook vectors, read from ``aqlm.QuantizedLinear``.

Additive quantization of Egiazarian et al. 2024, arXiv:2401.06118; the numbers follow
``aqlm/inference.py`` and ``aqlm/utils.py`` (1.1).
"""

from dataclasses import dataclass, replace

import torch
from aqlm import QuantizedLinear
from torch import Tensor

from fadapt._pytree import frozen_pytree
from fadapt.bases.aqlm_codes import decode, read_codes
from fadapt.bases.aqlm_encode import requantize
from fadapt.bases.op import FrozenLinear, is_batched
from fadapt.bases.precision import autocast_input, gemm_dtype
from fadapt.bases.protocol import register_base, register_state
from fadapt.errors import AdapterError, ConfigError
from fadapt.kernels.eager import traced


@frozen_pytree
@dataclass(frozen=True)
class Aqlm:
    """``W[group] = scale * sum_m codebooks[m][codes[group, m]]``.

    Attributes:
        codes: int8 or int16 ``[out_groups, in_groups, M]``, of which the low bits count; a
            transposed view where the layer has permuted its own.
        codebooks: ``[M, 2**nbits, out_group_size, in_group_size]``.
        scales: ``[out_groups, 1, 1, 1]``.
        bias: ``[out]`` or None.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.codes.shape[-2] * self.in_group_size

    @property
    def out_features(self) -> int:
        return self.codes.shape[-3] * self.out_group_size

    @property
    def in_group_size(self) -> int:
        return self.codebooks.shape[-1]

    @property
    def out_group_size(self) -> int:
        return self.codebooks.shape[-2]

    @property
    def num_codebooks(self) -> int:
        return self.codebooks.shape[-4]

    @property
    def nbits_per_codebook(self) -> int:
        return self.codebooks.shape[-3].bit_length() - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.codebooks.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def linear(self, x: Tensor) -> Tensor:
        """``W x + b``, ``[..., in] -> [..., out]`` in x's dtype, in any floating dtype."""
        x = autocast_input(x)
        if x.shape[-1] != self.in_features:  # the loops for CPUs index memory by it
            raise AdapterError(
                f"an AQLM layer of {self.in_features} inputs was given {list(x.shape)}."
            )
        y = _op(x, (self.codes, self.codebooks, self.scales), None)
        return y if self.bias is None else (y + self.bias).to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out, in]``; in the base's own dtype bit for bit AQLM's own.

        Differentiable in the codebooks and the scales.
        """
        dtype = dtype or self.dtype
        weight = decode(self.codes, self.codebooks.to(dtype))
        return weight * _each_row(self.scales.to(dtype), self.out_group_size)[:, None]

    def requantize(
        self,
        weight: Tensor,
        *,
        second_moment: Tensor | None = None,
        rounds: int = 0,
        beam: int = 8,
    ) -> "Aqlm":
        """A base of the same format whose weight is as close to ``weight`` as a search finds.

        The codes are searched by beam, the present ones always among the candidates, so a weight
        that this base holds already gives the base itself. A change smaller than the codebooks'
        own error is mostly lost: see :func:`fadapt.bases.aqlm_encode.tune_codebooks`.

        Args:
            weight: W ``[out, in]``, floating. Where the weight that was once quantized is known,
                give that plus the change, not ``dequantize()`` plus the change.
            second_moment: ``X^T X`` ``[in, in]`` of the layer's inputs: the error of the outputs
                on them is lowered, not that of W.
            rounds: how often codebooks and scales are solved for and the codes searched anew. At
                0 codebooks and scales stay, which is what blocks of rows can share.
            beam: combinations of codes that the search keeps.

        Raises:
            AdapterError: a wrong shape, NaN or Inf.
        """
        return requantize(self, weight, second_moment, rounds, beam)

    def rows(self, rows: slice) -> "Aqlm":
        """The base of ``W[rows]`` and ``b[rows]``, views of this one's tensors.

        Raises:
            ConfigError: the slice cuts through a group of ``out_group_size`` rows.
        """
        start, stop, step = rows.indices(self.out_features)
        size = self.out_group_size
        if step != 1 or start % size or (stop % size):
            raise ConfigError(
                f"rows({rows}) of an AQLM base whose groups span {size} output rows: both ends "
                f"must be multiples of {size}, the step 1."
            )
        groups = slice(start // size, max(start, stop) // size)
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, codes=self.codes[groups], scales=self.scales[groups], bias=bias)

    def state(self) -> dict[str, Tensor]:
        """``codes``, ``codebooks``, ``scales`` and ``bias`` in the layout of a layer that has not
        run yet.

        A layer that has run may hold its codes permuted: give the state to a fresh one, as
        :func:`aqlm_layer` makes. Each tensor is an object of its own (storage is shared), because
        AQLM's first forward replaces the data of the ``codes`` that it is given.
        """
        state = {
            "codes": self.codes.detach().contiguous(),
            "codebooks": self.codebooks.detach(),
            "scales": self.scales.detach(),
        }
        return state | ({} if self.bias is None else {"bias": self.bias.detach()})


def aqlm_layer(base: Aqlm) -> QuantizedLinear:
    """A fresh ``aqlm.QuantizedLinear`` that holds ``base`` and shares its storage."""
    layer = QuantizedLinear(
        base.in_features,
        base.out_features,
        base.in_group_size,
        base.out_group_size,
        base.num_codebooks,
        base.nbits_per_codebook,
        bias=base.bias is not None,
        device="meta",
        dtype=base.dtype,
    )
    layer.load_state_dict(base.state(), assign=True)
    return layer.requires_grad_(False)


def _each_row(scales: Tensor, out_group: int) -> Tensor:
    """The scale of each row of W: ``[out]``."""
    flat = scales.reshape(-1)
    return flat if out_group == 1 else flat.repeat_interleave(out_group)


def _multiply(x: Tensor, static: None, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    if x.is_cuda and not torch.compiler.is_compiling():
        from fadapt.kernels import aqlm_gpu

        if aqlm_gpu.usable(x, codes, codebooks):
            return aqlm_gpu.multiply(x, codes, codebooks, scales)
    y = _fast(x, codes, codebooks, scales, transposed=False)
    if y is None:
        rows = x.to(gemm_dtype(x))
        y = rows @ decode(codes, codebooks.to(rows.dtype)).mT
        y = y * _each_row(scales.to(y.dtype), codebooks.shape[2])
    return y.to(x.dtype)


def _transposed(
    g: Tensor, static: None, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> Tensor:
    if g.is_cuda and not torch.compiler.is_compiling():
        from fadapt.kernels import aqlm_gpu

        if aqlm_gpu.usable(g, codes, codebooks):
            return aqlm_gpu.multiply_transposed(g, codes, codebooks, scales)
    y = _fast(g, codes, codebooks, scales, transposed=True)
    if y is None:
        rows = g.to(gemm_dtype(g))
        rows = rows * _each_row(scales.to(rows.dtype), codebooks.shape[2])
        y = rows @ decode(codes, codebooks.to(rows.dtype))
    return y.to(g.dtype)


def _fast(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, transposed: bool
) -> Tensor | None:
    """The product by the loops for CPUs, in float32; None where they do not apply."""
    if not x.is_cpu or x.dtype == torch.float64:
        return None
    if traced() or is_batched(x):
        return None  # what traces would keep what a loop returns as a constant
    from fadapt.kernels import aqlm_cpu

    rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous()  # a slice of another
    if not aqlm_cpu.usable(rows, codes):
        return None
    product = aqlm_cpu.multiply_transposed if transposed else aqlm_cpu.multiply
    y = product(rows, codes, codebooks.detach().float(), scales.detach().float().reshape(-1))
    return y.view(*x.shape[:-1], -1)


_op = FrozenLinear(_multiply, _transposed)


def _read(layer: QuantizedLinear) -> Aqlm:
    bias = layer.bias
    return Aqlm(
        codes=read_codes(layer),
        codebooks=layer.codebooks.detach(),
        scales=layer.scales.detach(),
        bias=None if bias is None else bias.detach(),
    )


def _take_state(layer: QuantizedLinear, name: str, own: Tensor) -> None:
    # A state's codes lie as in a layer that has not run, whatever the kernel that this layer chose.
    if name == "codes" and layer.codes.data_ptr() != own.data_ptr():
        layer.gemv_op = None


register_base(QuantizedLinear, _read)
register_state(QuantizedLinear, _take_state)
