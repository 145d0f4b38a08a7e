"""A file of prompts, each with the name of the adapter that it wears."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fadapt.bank import BASE_NAME
from fadapt.corpus import half_pair
from fadapt.errors import ConfigError, listing, near

_KEYS = ("adapter", "prompt")


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        adapter: a name, or ``"base"``.
        text: what is to be continued.
        where: the file and the line, for messages.
    """

    adapter: str
    text: str
    where: str


def read_prompts(path: Path, adapters: Iterable[str]) -> list[Prompt]:
    """The prompts of a ``.jsonl`` of ``{"adapter": ..., "prompt": ...}``, or of a ``.tsv`` of
    ``adapter<TAB>prompt`` (what follows the first tab, as it stands). Empty lines do not count.

    Args:
        path: of the file.
        adapters: the names that there are.

    Raises:
        ConfigError: a line that is no prompt, or names no adapter; a file without prompts.
    """
    if path.suffix not in (".jsonl", ".tsv"):
        raise ConfigError(f"--prompts {path}: expected a .jsonl or a .tsv file.")
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: {error}.") from error
    names = list(adapters)
    read = _json if path.suffix == ".jsonl" else _tabbed
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = read(line.removesuffix("\r"), f"{path}, line {number}")
        if prompt.adapter != BASE_NAME and prompt.adapter not in names:
            raise ConfigError(
                f"{prompt.where}: there is no adapter {prompt.adapter!r}."
                f"{near(prompt.adapter, [*names, BASE_NAME])} --adapter names {listing(names)}; "
                "'base' is the model without an adapter."
            )
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"--prompts {path}: the file holds no prompt.")
    return prompts


def _json(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error
    texts = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if not texts or set(value) != set(_KEYS):
        raise ConfigError(
            f'{where}: expected an object with the strings "adapter" and "prompt", and no more; '
            f"got {line.strip()[:60]!r}."
        )
    if half_pair(value["prompt"]):
        raise ConfigError(f"{where}: the prompt holds half of a surrogate pair, which is no text.")
    return Prompt(value["adapter"], value["prompt"], where)


def _tabbed(line: str, where: str) -> Prompt:
    adapter, tab, text = line.partition("\t")
    if not tab:
        raise ConfigError(f"{where}: expected adapter<TAB>prompt, got {line[:60]!r}.")
    return Prompt(adapter, text, where)
