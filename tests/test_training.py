"""The batched step: its AdamW, its freezing, each adapter trained as if alone."""

import pytest
import torch
from small_lm import make_model, make_texts

import fadapt as fa
from fadapt import corpus, training
from fadapt.errors import ConfigError
from fadapt.job import prepare
from fadapt.loop import train
from fadapt.settings import Settings


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("lm")
    return make_model(root / "model"), make_texts(root / "texts")


def settings(paths, **more):
    model, texts = paths
    small = {"steps": 5, "batch": 2, "length": 16, "eval_every": 5, "rank": (2,), "lr": (0.01,)}
    return Settings(model=str(model), data=str(texts / "python.txt"), **small | more)


def trained(chosen, out):
    job = prepare(chosen)
    out.mkdir()
    state, history, _ = train(job, out, False, lambda state, history: None, compare=False)
    return job, state, history


@pytest.mark.parametrize(("base", "dropout"), [("int8", 0.0), ("dense", 0.2)])
def test_training_many_is_training_each_alone(paths, tmp_path, base, dropout):
    axes = {"lr": (0.01, 0.03), "rank": (2, 3), "targets": ("q_proj,down_proj", "all-linear")}
    both = {"base": base, "dropout": dropout, "seed": (7,)}
    job, state, history = trained(settings(paths, **both, **axes), tmp_path / "many")
    many = dict(zip([t.name for t in job.trials], job.apart(state.params), strict=True))
    assert len(many) == 8
    for k in (0, 3, 6):
        trial = job.trials[k]
        alone = {
            "lr": (trial.lr,),
            "rank": (trial.method.rank,),
            "targets": (axes["targets"][int(trial.name[trial.name.index("-t") + 2])],),
        }
        one, state1, history1 = trained(settings(paths, **both, **alone), tmp_path / f"{k}")
        (params,) = one.apart(state1.params)
        assert params.keys() == many[trial.name].keys()
        # Float32 sums in another order, 1e-6 of the gradient; Adam divides by the gradient's own
        # size, so an element near zero may differ by more, but by less than a hundredth of the
        # five steps of lr at most.
        torch.testing.assert_close(many[trial.name], params, rtol=1e-4, atol=0.01 * 5 * trial.lr)
        losses = [torch.stack(h.losses)[:, i] for h, i in ((history, k), (history1, 0))]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(history.held[-1][k], history1.held[-1][0], rtol=1e-4, atol=0)


def test_the_step_is_torchs_adamw_on_the_plain_gradient(paths, tmp_path):
    chosen = settings(paths, decay=0.1, clip=0.5, base="dense")
    job, state, _ = trained(chosen, tmp_path / "run")
    forward = fa.bind(job.model, job.trials[0].method)
    params = {
        path: leaf._replace(**{n: t.clone().requires_grad_() for n, t in leaf._asdict().items()})
        for path, leaf in job.adapters[0].items()
    }
    leaves = [t for leaf in params.values() for t in leaf]
    optimizer = torch.optim.AdamW(leaves, weight_decay=0.1)
    text = job.texts[0].train
    for step in range(5):
        tokens = text[corpus.rows_at(0, step, 2, len(text))]
        logits = forward(params, input_ids=tokens[:, :-1].clamp(min=0)).logits
        labels = tokens[:, 1:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.param_groups[0]["lr"] = 0.01 * training.schedule(step, 5, chosen.warmup)
        optimizer.step()
        optimizer.zero_grad()
    (mine,) = job.apart(state.params)
    theirs = {p: type(leaf)(*[t.detach() for t in leaf]) for p, leaf in params.items()}
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0.01 * 5 * 0.01)  # as above


def test_one_adapter_that_diverges_is_frozen_and_the_others_do_not_notice(paths, tmp_path):
    wild = settings(paths, lr=(0.01, 1e30), steps=8)
    calm = settings(paths, lr=(0.01, 0.02), steps=8)
    _, state, history = trained(wild, tmp_path / "wild")
    _, same, _ = trained(calm, tmp_path / "calm")
    assert torch.equal(state.params[0], same.params[0])
    assert state.frozen[0] == -1
    assert 0 < state.frozen[1] < 8
    at = int(state.frozen[1])
    assert not history.losses[at][1].isfinite()
    assert all(losses[1].isfinite() for losses in history.losses[:at])
    assert state.params[1].isfinite().all()
    assert torch.stack(history.held)[-1].isfinite().all()


def test_a_failure_in_the_very_last_step_is_noticed_by_the_last_look(paths, tmp_path):
    job, state, history = trained(settings(paths, lr=(0.01, 1e38), steps=1), tmp_path / "run")
    assert state.frozen.tolist() == [-1, 0]
    assert torch.equal(state.params[1], job.rows[1])  # its first weights: the only good ones
    assert history.held[-1].isfinite().all()


def test_update_leaves_its_inputs_alone_and_padding_zero(paths):
    job = prepare(settings(paths, rank=(1, 4)))
    state = training.start(job.rows)
    before = [t.clone() for t in state[:-1]]
    tokens = torch.stack([t.train[:2] for t in job.texts])
    losses, grads = training.gradients(job.forward, job.layout, state.params, job.scales, tokens)
    after = training.update(state, losses, grads, torch.tensor([0.1, 0.1]), 1.0, 0.1)
    assert all(map(torch.equal, before, state[:-1]))
    leaf = job.layout.tree(after.params)["model.layers.0.self_attn.q_proj"]
    assert not leaf.lora_A[0, 1:].any()
    assert leaf.lora_A[1].all()


def test_the_schedule_rises_and_falls():
    rates = [training.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_windows_overlap_by_one_token_and_every_token_is_a_label_once():
    rows = corpus.windows(torch.arange(10), 4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, -100, -100, -100]]
    assert corpus.windows(torch.arange(9), 4).tolist() == rows.tolist()[:2]
    labels = rows[:, 1:].flatten()
    assert labels[labels >= 0].tolist() == list(range(1, 10))


def test_every_epoch_sees_every_window_once_in_its_own_order():
    seen = [i for step in range(14) for i in corpus.rows_at(3, step, 3, 7)]
    epochs = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert seen[:7] != [i for step in range(3) for i in corpus.rows_at(4, step, 3, 7)][:7]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", "\n  \n", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 'line 2: expected an object with a string "t'),
        ("a.jsonl", '["text"]', "line 1: expected an object"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: the text holds half of a surrogate pair"),
        ("a.csv", "text\na\n", r"expected a \.txt or a \.jsonl"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=match):
        corpus.read_documents(path)
