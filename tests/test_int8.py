"""Int8: torchao's own numbers, and derivatives that hold where torchao's raise."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    quantize_,
)

import fadapt as fa


def quantized(config, n_in=64, n_out=16, dtype=torch.float32, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    quantize_(layer, config)
    return layer


WEIGHT_ONLY = {
    "per_row": Int8WeightOnlyConfig(granularity=PerRow()),
    "per_group": Int8WeightOnlyConfig(granularity=PerGroup(32)),
}


DYNAMIC = {"dynamic": Int8DynamicActivationInt8WeightConfig()}


@pytest.mark.parametrize("kind", [*WEIGHT_ONLY, *DYNAMIC])
def test_gradients_batched_by_the_older_vmap(kind):
    config = (WEIGHT_ONLY | DYNAMIC)[kind]
    base = fa.base_of(quantized(config))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # By row the scale multiplies the product, exactly; by group W is rounded to its dtype first.
    weight = base.dequantize(None if kind == "per_group" else torch.float64).double()
    g = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(base.linear(x), x, g, is_grads_batched=True)
    # float64 throughout, 64 products a sum: only the order of the sums differs.
    torch.testing.assert_close(dx, g @ weight, rtol=1e-12, atol=1e-12)
    dy = jacobian(base.linear, x.detach()[0], vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(dy, weight, rtol=1e-12, atol=1e-12)
