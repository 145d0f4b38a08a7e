"""Real ``aqlm.QuantizedLinear`` layers with random contents."""

import numba
import torch
from aqlm import QuantizedLinear

# AQLM's own CPU kernel adds into one output from all of its threads: with two of them 89 % of the
# calls on a 32 x 256 layer were wrong, with one none. What tests compare with must be right.
_threads = torch.get_num_threads()
numba.set_num_threads(1)
torch.set_num_threads(_threads)  # numba starts a pool of all cores, which torch then uses too


def quantized(fmt=(2, 8, 8, 1), n_in=64, n_out=16, dtype=torch.float32, bias=True):
    """A layer of the format (codebooks, bits, in group, out group), every code in use."""
    books, bits, in_group, out_group = fmt
    layer = QuantizedLinear(n_in, n_out, in_group, out_group, books, bits, bias=bias, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    layer.codes.data = torch.randint(low, high, layer.codes.shape, generator=g).to(layer.codes)
    # Weights and biases as large as those of a fresh nn.Linear, the scales all different.
    layer.codebooks.data = torch.randn(layer.codebooks.shape, generator=g).to(dtype)
    scales = 0.5 + torch.rand(layer.scales.shape, generator=g)
    layer.scales.data = (scales / (3 * books * n_in) ** 0.5).to(dtype)
    if bias:
        layer.bias.data = (torch.randn(n_out, generator=g) / (3 * n_in) ** 0.5).to(dtype)
    return layer


def used(layer):
    """The layer after a forward on the CPU, which permutes 256-entry codes in place."""
    with torch.no_grad():
        layer(torch.zeros(1, layer.in_features))
    return layer
