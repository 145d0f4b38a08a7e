"""``fadapt sweep`` and ``fadapt train`` from the command line to the folders they leave."""

import json

import pytest
from small_lm import make_model, make_texts

from fadapt import cli


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm")
    return make_model(root / "model"), make_texts(root / "texts")


def flags(paths, out, *more):
    model, texts = paths
    small = "--steps 6 --batch 2 --length 16 --eval-every 3 --save-every 2 --rank 2 3"
    return [
        *("sweep", "--model", str(model), "--data", str(texts), "--out", str(out)),
        *small.split(),
        *more,
    ]


def test_a_sweep_trains_and_leaves_its_files(paths, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(flags(paths, out, "--lr", "0.02", "--steps", "30")) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "4 adapters at once" in told.out
    rows = json.loads((out / "results.json").read_text())["adapters"]
    assert {r["name"] for r in rows} == {p.name for p in (out / "adapters").iterdir()}
    assert len(rows) == 4
    gains = [r["base_loss"] - r["held_out_loss"] for r in rows]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.1  # nats: one sentence twelve times over is learned at once
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
