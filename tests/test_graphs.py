"""cuda_graph: what is refused where there is no GPU, and on one that a replay is the call."""

import pytest
import torch
from cases import METHODS, dense, randomized
from torch.utils._pytree import tree_map

import fadapt as fa
from fadapt.testing import assert_pure


def test_what_does_not_lie_on_one_gpu_is_refused():
    with pytest.raises(fa.errors.ConfigError, match=r"lie on \['cpu'\]\. Move model"):
        fa.cuda_graph(torch.add, torch.ones(2), torch.ones(2))
    with pytest.raises(fa.errors.ConfigError, match="lie on no device"):
        fa.cuda_graph(lambda: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("kind", METHODS, ids=lambda m: m.name)
def test_a_replay_is_the_call(kind):
    model = dense(16, 8).cuda()
    forward, g = fa.bind(model, kind.method), torch.Generator().manual_seed(0)
    fresh = fa.init(kind.method, model, generator=g)
    params = [randomized(fresh, seed) for seed in range(2)]
    xs = torch.randn(2, 5, 16, generator=g).cuda()
    step = fa.value_and_grad(lambda p, x: forward(p, x).square().mean())
    graph = fa.cuda_graph(step, params[0], xs[0])
    first = assert_pure(lambda: graph(params[0], xs[0]), model, params, xs)
    kept = tree_map(torch.clone, first)
    for p, x in zip(params, xs, strict=True):  # the very kernels of the call
        torch.testing.assert_close(graph(p, x), step(p, x), rtol=0, atol=0)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    with pytest.raises(fa.errors.ConfigError, match=r"captured with torch.float32 \[5, 16\]"):
        graph(params[0], xs[0, :4])
