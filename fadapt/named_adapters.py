"""``--adapter NAME=DIR`` on the command line: adapters by name, as one bank."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fadapt.bank import BASE_NAME, Bank
from fadapt.errors import ConfigError, FadaptError
from fadapt.peft import load_peft


def adapter_folders(words: Sequence[str]) -> dict[str, Path]:
    """``{name: folder}`` of the words ``NAME=DIR``.

    Raises:
        ConfigError: a word of another form, a name twice or ``"base"``, no such folder.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter {word}: expected NAME=DIR.")
        if name == BASE_NAME or name in folders:
            why = "is the model without an adapter" if name == BASE_NAME else "was given twice"
            raise ConfigError(f"--adapter {word}: the name {name!r} {why}; choose another.")
        if not Path(folder).is_dir():
            raise ConfigError(f"--adapter {word}: there is no such folder.")
        folders[name] = Path(folder)
    return folders


def load_bank(model: Any, folders: Mapping[str, Path]) -> Bank:
    """The adapters of these PEFT folders.

    Raises:
        FadaptError: what :func:`fadapt.load_peft` or the bank raises, with the adapter's name.
    """
    return Bank.holding(model, {n: _load(n, folder, model) for n, folder in folders.items()})


def _load(name: str, folder: Path, model: Any) -> tuple[Any, Any]:
    try:
        return load_peft(folder, model)
    except FadaptError as error:
        raise type(error)(f"--adapter {name}={folder}: {error}") from error
