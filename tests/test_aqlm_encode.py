"""Encoding a weight as AQLM, encoding it anew, and least squares on codebooks and scales."""

import itertools

import pytest
import torch
from aqlm.utils import _dequantize_weight, unpack_int_data

import fadapt as fa
from fadapt.bases.aqlm import aqlm_layer
from fadapt.bases.aqlm_encode import error_of, recode, tune_codebooks
from fadapt.bases.aqlm_fresh import bits_per_weight, encode
from fadapt.bases.aqlm_search import from_groups, nearest_codes, to_groups, vectors
from fadapt.errors import AdapterError, ConfigError
from fadapt.testing import assert_pure


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def weight():
    return 0.02 * torch.randn(96, 128, generator=seeded())


@pytest.fixture(scope="module")
def base(weight):
    return encode(weight, generator=seeded())


@pytest.fixture(scope="module")
def moment():
    """Second moments of inputs that lie mostly in a few directions."""
    x = torch.randn(512, 128, generator=seeded(1)) * torch.logspace(0.5, -1.5, 128)
    x = x @ torch.linalg.qr(torch.randn(128, 128, generator=seeded(2)))[0]
    return x.mT @ x


def test_the_search_beside_all_combinations():
    books = torch.randn(2, 16, 4, generator=seeded())
    targets = 1.5 * torch.randn(300, 4, generator=seeded(1))
    every = torch.tensor(list(itertools.product(range(16), range(16))))
    sums = vectors(every, books)
    least = torch.cdist(targets.double(), sums.double()).square().amin(1)
    current = torch.zeros(300, 2, dtype=torch.int64)

    def error(codes):
        return (targets.double() - vectors(codes, books).double()).square().sum(-1)

    found = error(assert_pure(lambda: nearest_codes(targets, books, current, 16), targets, books))
    # All first codes are tried, and the best second for each: only rounding can part them.
    torch.testing.assert_close(found, least, rtol=1e-5, atol=1e-6)
    assert (error(nearest_codes(targets, books, current, 1)) <= error(current)).all()
    # The best codes given as the current ones are kept, even by the greedy search.
    best = every[torch.cdist(targets, sums).argmin(1)]
    assert torch.equal(nearest_codes(targets, books, best, 1), best)


def test_groups():
    weight = torch.arange(48.0).reshape(6, 8)
    groups = to_groups(weight, 2, 4)
    assert groups[1, 1].tolist() == [20, 21, 22, 23, 28, 29, 30, 31]
    assert torch.equal(from_groups(groups, 2), weight)


@pytest.mark.parametrize(
    ("fmt", "bound"),
    [
        # No code of R bits an element leaves less than 2**-R of long Gaussian vectors; these come
        # within 15 % of that.
        ((2, 8, 8, 1), 1.15 / 4),
        ((1, 8, 8, 1), 1.15 / 2),
        ((3, 8, 8, 1), 1.15 / 8),
        ((2, 5, 4, 2), 1.15 / 2**1.25),
        ((1, 12, 8, 1), 1e-6),  # more vectors than groups: the weight itself, in float32
    ],
)
def test_the_quality_of_an_encoding(weight, fmt, bound):
    books, bits, n_in, n_out = fmt
    sizes = {"in_group_size": n_in, "out_group_size": n_out}
    new = encode(
        weight,
        torch.ones(96),
        num_codebooks=books,
        nbits_per_codebook=bits,
        generator=seeded(),
        **sizes,
    )
    assert error_of(new, weight) ** 0.5 < bound
    assert bits_per_weight(new)[0] == books * bits / (n_in * n_out)
    layer = aqlm_layer(new)
    codes = unpack_int_data(layer.codes, bits)
    assert torch.equal(_dequantize_weight(codes, layer.codebooks, layer.scales), new.dequantize())
    assert torch.equal(layer.bias, torch.ones(96))


def test_encoding_is_a_function_of_its_arguments(weight, base):
    again = assert_pure(lambda: encode(weight, generator=seeded()), weight)
    assert all(map(torch.equal, again.state().values(), base.state().values()))
    half = encode(weight.bfloat16(), generator=seeded())
    assert half.dtype == half.scales.dtype == torch.bfloat16
    # bfloat16 codebooks: three sums of two rounded vectors cost at most a hundredth.
    assert abs(error_of(half, weight) ** 0.5 - error_of(base, weight) ** 0.5) < 0.01


def test_requantize_of_what_it_holds_is_itself(base):
    assert base.requantize(base.dequantize()) is base
    assert torch.equal(recode(base, base.dequantize()).codes, base.codes)
    assert torch.equal(recode(base, base.dequantize(), torch.eye(128)).codes, base.codes)


@pytest.mark.parametrize("rounds", [0, 1])
def test_requantize_never_loses(weight, base, moment, rounds):
    target = weight + 0.01 * torch.randn(96, 4, generator=seeded(3)) @ torch.randn(
        4, 128, generator=seeded(4)
    )
    for second in (None, moment):
        new = assert_pure(
            lambda m=second: base.requantize(target, second_moment=m, rounds=rounds), base, target
        )
        assert new.codes.dtype == base.codes.dtype
        assert not torch.equal(new.codes, base.codes)
        # A target half of which is new: least squares and search must take a good part of it.
        assert error_of(new, target, second) < 0.5 * error_of(base, target, second)
        if rounds == 0:
            assert new.codebooks is base.codebooks


def test_second_moments_lower_the_error_of_outputs(weight, moment):
    plain = encode(weight, rounds=1, generator=seeded())
    aware = encode(weight, rounds=1, second_moment=moment, generator=seeded())
    assert error_of(aware, weight, moment) < 0.5 * error_of(plain, weight, moment)
    assert error_of(aware, weight) > error_of(plain, weight)


def test_least_squares_is_the_optimum(base, weight):
    tuned = assert_pure(lambda: tune_codebooks(base, weight, steps=50), base, weight)
    assert torch.equal(tuned.codes, base.codes)
    assert error_of(tuned, weight) <= error_of(base, weight)
    books = tuned.codebooks.double().requires_grad_()
    scales = tuned.scales.double().requires_grad_()
    wide = type(base)(base.codes, books, scales)
    loss = (wide.dequantize() - weight).square().sum() / weight.double().square().sum()
    slope_books, slope_scales = torch.autograd.grad(loss, (books, scales))
    # Stationary: a relative change of all codebooks or scales moves the loss by less than 1e-3 of
    # its value (ridge 1e-4, and conjugate gradients stopped at 1e-5 of where they started).
    assert (slope_books * books).abs().sum() < 2e-2 * loss
    assert (slope_scales * scales).abs().sum() < 2e-2 * loss


def test_what_cannot_be_encoded(weight, base):
    with pytest.raises(ConfigError, match=r"1 x 7.*\(96, 128\)"):
        encode(weight, in_group_size=7, generator=seeded())
    with pytest.raises(ConfigError, match="1 to 16 bits, got 2 x 17"):
        encode(weight, nbits_per_codebook=17, generator=seeded())
    with pytest.raises(ConfigError, match="int64"):
        encode(weight.long(), generator=seeded())
    with pytest.raises(AdapterError, match=r"\(96, 128\).*\(128, 96\)"):
        base.requantize(weight.mT)
    with pytest.raises(AdapterError, match="NaN"):
        base.requantize(weight / 0)
    with pytest.raises(AdapterError, match=r"\(128, 128\), got \(3, 3\)"):
        base.requantize(weight, second_moment=torch.eye(3))


def test_a_pissa_base_is_encoded_anew(base):
    method = fa.LoRA(rank=2, init="pissa")
    _, residual = method.init_layer(base, None)
    assert type(residual) is type(base)
    assert residual.codebooks is base.codebooks
