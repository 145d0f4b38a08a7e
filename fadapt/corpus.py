"""Text files into windows of tokens, and which windows an adapter sees at a step.

The order is a pure function of the seed and the step. So a stopped run needs no generator's state
to go on, and an adapter sees the same text alone as beside others.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fadapt.errors import ConfigError

IGNORED = -100  # a label that no loss counts, as torch's cross_entropy has it
HELD_OUT = 10  # one token in ten is held out, at the end of the text
MOST_HELD_OUT = 64  # windows; evaluation of a large text stays short
SUFFIXES = (".txt", ".jsonl")


class Corpus(NamedTuple):
    """One text.

    Attributes:
        name: the file's, without its suffix.
        train: int64 ``[windows, length + 1]``: a window's inputs are all but its last token, its
            labels all but its first; padded at the end with :data:`IGNORED`.
        held: the same for held-out text.
        digest: of the tokens, so that a changed file is noticed.
    """

    name: str
    train: Tensor
    held: Tensor
    digest: str


def find_texts(data: Path) -> list[Path]:
    """The file itself, or the .txt and .jsonl files of a folder, by name."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise ConfigError(f"--data {data}: there is no such file or folder.")
    found = sorted(p for p in data.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise ConfigError(f"--data {data}: the folder has no {' or '.join(SUFFIXES)} file.")
    stems = [p.stem for p in found]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        raise ConfigError(f"--data {data}: two files are named {twice[0]!r}; rename one.")
    return found


def read_documents(path: Path) -> list[str]:
    """A .txt is one document; each line of a .jsonl is an object with a string ``"text"``.

    Raises:
        ConfigError: nothing to read, or a line that is none such, with its number.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: expected a .txt or a .jsonl file.")
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}).") from error
    documents = [content] if path.suffix == ".txt" else _json_lines(path, content)
    if not any(d.strip() for d in documents):
        raise ConfigError(f"{path}: the file holds no text.")
    return documents


def _json_lines(path: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error}).") from error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise ConfigError(
                f'{path}, line {number}: expected an object with a string "text", got '
                f"{line.strip()[:60]!r}."
            )
        if half_pair(text):
            raise ConfigError(
                f"{path}, line {number}: the text holds half of a surrogate pair, which is no text."
            )
        documents.append(text)
    return documents


def half_pair(text: str) -> bool:
    """Whether the string is none that has an encoding, as JSON's ``\\ud800`` makes one."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def read_corpus(path: Path, encode: Callable[[str], Sequence[int]], end: int, length: int) -> Any:
    """One file as a :class:`Corpus`.

    Args:
        path: of the file.
        encode: a text's tokens.
        end: the token after each document.
        length: tokens a window.

    Raises:
        ConfigError: too short to train on and to hold some out.
    """
    tokens = torch.tensor([t for text in read_documents(path) for t in (*encode(text), end)])
    held = min(max(2, len(tokens) // HELD_OUT), MOST_HELD_OUT * length + 1)
    if len(tokens) < held + 2:
        raise ConfigError(f"{path}: {len(tokens)} tokens are too few to train on.")
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Corpus(
        path.stem, windows(tokens[:-held], length), windows(tokens[-held:], length), digest
    )


def windows(tokens: Tensor, length: int) -> Tensor:
    """``[n, length + 1]``: each begins with the last token of the one before."""
    count = -(-(len(tokens) - 1) // length)
    padded = tokens.new_full((count * length + 1,), IGNORED)
    padded[: len(tokens)] = tokens
    return padded.unfold(0, length + 1, length).contiguous()


def rows_at(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Which of ``count`` windows make the batch of a step: epoch after epoch, each in its order."""
    positions = range(step * batch, (step + 1) * batch)
    return [_order(seed, p // count, count)[p % count] for p in positions]


@lru_cache(maxsize=256)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator_at(seed, 2 * epoch)).tolist()
    return order


def dropout_seed(seed: int, step: int) -> int:
    """The seed of the dropout masks of a step."""
    return int(torch.randint(0, 2**31, (), generator=generator_at(seed, 2 * step + 1)))


def generator_at(seed: int, stream: int) -> torch.Generator:
    """A generator for one purpose: another for each seed and stream."""
    mixed = hashlib.sha256(f"{seed} {stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little"))
