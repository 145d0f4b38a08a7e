"""Rounding with feedback: it is GPTQ, wherever its factor lies; and what is no X^T X is refused."""

import io
import tempfile

import pytest
import torch
from test_merge import adapter_of, model_of, quantized
from torch import Tensor, nn

import fadapt as fa
from fadapt import feedback as module
from fadapt.bases.grid import Grid
from fadapt.errors import AdapterError
from fadapt.testing import assert_pure

CPU = torch.device("cpu")


def moment_of(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``X^T X`` of inputs that go together, as activations do."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=g) @ torch.randn(n, n, generator=g)
    return (x.T.double() @ x.double()).to(dtype)


def gptq(grid: Grid, weight: Tensor, moment: Tensor) -> Tensor:
    """Algorithm 1 of GPTQ's paper, a column at a time, by the factor of the inverse."""
    n = len(moment)
    H = moment + 0.01 * moment.diagonal().mean() * torch.eye(n, dtype=moment.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    weight, codes = weight.clone(), torch.empty(weight.shape, dtype=grid.kind)
    for j in range(n):
        one = grid.columns(slice(j, j + 1), n)
        codes[:, j : j + 1] = code = one.nearest(weight[:, j : j + 1])
        error = (weight[:, j : j + 1] - one.values(code, weight.dtype)) / factor[j, j]
        weight[:, j:] -= error * factor[j, j:]
    return codes


def found(grid: Grid, weight: Tensor, moment: Tensor) -> Tensor:
    codes = torch.empty(weight.shape, dtype=grid.kind)
    with module.factored(moment, weight.dtype, CPU, "0") as factor:
        module.feedback(grid, weight.clone(), factor, codes)
    return codes


@pytest.mark.parametrize("name", ["int8-row", "int8-tensor", "int8-group"])
@pytest.mark.parametrize("n", [4, 128, 300])  # a part of a panel, one, and more than two
def test_it_is_gptq(name, n, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 96)  # several to a panel; not all alike
    base = fa.base_of(quantized(nn.Linear(n, 24), name))
    weight = base.dequantize().double() * 0.9  # off the grid; in float64, so that no tie is a tie
    moment, grid = moment_of(n), base.grid()
    codes = found(grid, weight, moment)
    assert torch.equal(codes, gptq(grid, weight, moment))
    assert not torch.equal(codes, grid.nearest(weight))


def test_the_factor_is_one_of_the_damped_moment_and_the_same_in_a_file(monkeypatch):
    moment = moment_of(300)
    H = moment + 0.01 * moment.diagonal().mean() * torch.eye(300, dtype=moment.dtype)
    base = fa.base_of(quantized(nn.Linear(300, 24), "int8-row"))
    weight, codes = base.dequantize().double() * 0.9, []
    files: list = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **k: files.append(real(**k)) or files[-1])
    for held in (2**22, 0):
        monkeypatch.setattr(module, "HELD", held)
        with module.factored(moment, moment.dtype, CPU, "0") as factor:
            # A copy of each: the next one may take its place.
            blocks = [factor.read(s, slice(0, min(s + 128, 300))).clone() for s in (0, 128, 256)]
        U = torch.zeros_like(H)
        for start, block in zip((0, 128, 256), blocks, strict=True):
            U[: len(block), start : start + block.shape[1]] = block
        assert torch.equal(U.triu(1) + torch.eye(300), U)
        D = torch.linalg.solve_triangular(
            U, torch.linalg.solve_triangular(U, H, upper=True).T, upper=True
        )
        # 300 sums in float64, of a matrix whose condition number is at most 300 / 0.01.
        torch.testing.assert_close(D, D.diagonal().diag(), rtol=0, atol=1e-9 * float(H.amax()))
        codes.append(found(base.grid(), weight, moment))
    assert len(files) == 2
    assert all(file.closed for file in files)
    assert torch.equal(*codes)


class Full(io.BytesIO):
    """A file of a disk that has room for one write."""

    def __init__(self, **options):
        super().__init__()
        self.left = 1

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return super().write(data)


def no_folder(**options):
    raise FileNotFoundError(2, "No usable temporary directory found")


@pytest.mark.parametrize("broken", [Full, no_folder])
def test_a_disk_without_room_changes_nothing_but_the_memory(monkeypatch, broken):
    model, method = model_of("int8-row", 300, 24), fa.LoRA(rank=2, targets=["0"])
    params, moments = adapter_of(model, method), {"0": moment_of(300, torch.float32)}

    def merged():
        return fa.merge(model, params, method, rounding="feedback", moments=moments)

    first = assert_pure(merged, model, params, moments)["0.weight"].qdata
    monkeypatch.setattr(module, "HELD", 0)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", broken)
    assert torch.equal(merged()["0.weight"].qdata, first)


def test_what_is_no_moment_is_refused(monkeypatch):
    monkeypatch.setattr(module, "HELD", 0)  # its file is closed all the same
    model, method = model_of("int8-row"), fa.LoRA(rank=2, targets=["0"])
    params = adapter_of(model, method)
    for bad in (float("nan"), float("inf"), -100.0):
        moment = torch.eye(16)
        moment[3, 3] = bad
        with pytest.raises(AdapterError, match=r"'0' is no X\^T X"):
            fa.merge(model, params, method, rounding="feedback", moments={"0": moment})
    # Of no inputs, or of inputs that are all zeros: nothing to weigh by, so nearest.
    options = {"rounding": "feedback", "moments": {"0": torch.zeros(16, 16)}}
    state = fa.merge(model, params, method, **options)
    assert torch.equal(state["0.weight"].qdata, fa.merge(model, params, method)["0.weight"].qdata)
