"""What a run needs before its first step: the model, the texts, the trials, their first weights."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fadapt import training
from fadapt.adapter import init
from fadapt.corpus import Corpus, find_texts, read_corpus
from fadapt.functional import Forward, bind
from fadapt.lora import LoRA
from fadapt.models import SHIPPED, fingerprint, load_model, load_tokenizer, quiet
from fadapt.settings import Settings, to_json
from fadapt.stacking import stack, unstack
from fadapt.training import Layout
from fadapt.trials import Trial, grid


class Job(NamedTuple):
    """All that stays the same while a run trains.

    Attributes:
        settings: of the run.
        model: frozen, quantized.
        trials: K of them.
        texts: one for each trial; trials of one text share it.
        adapters: the first parameters of each trial, not padded.
        unit: the method of the stack.
        forward: bound with ``unit``.
        rows: the first parameters, ``[K, P]``.
        layout: of the rows.
        scales: ``{path: [K]}``; None where ``unit`` scales by itself.
        steps: how many to make.
        about: what a resumed run must have in common with this one.
    """

    settings: Settings
    model: nn.Module
    trials: list[Trial]
    texts: list[Corpus]
    adapters: list[Any]
    unit: Any
    forward: Forward
    rows: Tensor
    layout: Layout
    scales: Any
    steps: int
    about: dict[str, Any]

    def apart(self, rows: Tensor) -> list[Any]:
        """The adapters in ``rows [K, P]``, one by one, without padding."""
        return unstack(self.layout.tree(rows), self.unit)


def prepare(settings: Settings, load: Any = None) -> Job:
    """Read the model and the texts, make the trials and their first adapters.

    Args:
        settings: of the run.
        load: ``load(model) -> (params, method)`` to start the only trial from; None for fresh
            weights.

    Raises:
        FadaptError: something given cannot be used. Nothing was written.
    """
    folder = Path(settings.model) if settings.model else SHIPPED / "model"
    paths = find_texts(Path(settings.data) if settings.data else SHIPPED / "texts")
    tokenizer = load_tokenizer(folder)

    def encode(text: str) -> list[int]:
        with quiet():  # it warns that a text is longer than the model's context: it is cut later
            return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    texts = {p.stem: read_corpus(p, encode, tokenizer.eos_token_id, settings.length) for p in paths}
    model = load_model(folder, settings.base, settings.dtype, settings.device, settings.length)
    trials = grid(settings, list(texts))
    if load is None:
        adapters = [_fresh(t, model) for t in trials]
    else:
        params, method = load(model)
        if settings.dropout is not None:
            method = replace(method, dropout=settings.dropout)
        adapters, trials = [params], [trials[0]._replace(method=method)]
    methods = [t.method for t in trials]
    if all(type(m) is LoRA for m in methods):
        many, unit = stack(adapters, methods=methods, fold=False)
        scales = unit.scalings(tree_leaves(many)[0])
    else:
        many, unit, scales = stack(adapters), methods[0], None
    rows, layout = training.to_rows(many)
    steps = settings.steps
    if settings.epochs is not None:
        largest = max(len(text.train) for text in texts.values())
        steps = math.ceil(settings.epochs * largest / settings.batch)
    about = {
        "settings": to_json(settings),
        "model": fingerprint(folder),
        "texts": {name: text.digest for name, text in texts.items()},
        "first weights": hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest(),
    }
    held = [_to(texts[t.data], rows.device) for t in trials]
    return Job(
        settings, model, trials, held, adapters, unit, bind(model, unit), rows, layout, scales,
        steps, about,
    )  # fmt: skip


def _fresh(trial: Trial, model: nn.Module) -> Any:
    return init(trial.method, model, generator=torch.Generator().manual_seed(trial.seed))


def _to(text: Corpus, device: torch.device) -> Corpus:
    return text._replace(train=text.train.to(device), held=text.held.to(device))
