"""Every exception that fadapt raises on purpose. All derive from :class:`FadaptError`.

Each also derives from the built-in that a caller would expect (``ValueError``, ``TypeError``), so
``except ValueError`` keeps working in code that does not know fadapt.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class FadaptError(Exception):
    """Base of all of fadapt's exceptions."""


class ConfigError(FadaptError, ValueError):
    """A hyperparameter, or a combination of them, that cannot work."""


class TargetError(FadaptError, ValueError):
    """A pattern that matches nothing, or layers that cannot be adapted."""


class UnsupportedLayerError(FadaptError, TypeError):
    """A layer for which there is no base."""


class AdapterError(FadaptError, ValueError):
    """An adapter that does not fit: a missing path, a wrong shape or dtype."""


class CheckpointError(FadaptError, ValueError):
    """A checkpoint folder that cannot be read as it stands, or a key that nothing claims."""


class MergeError(FadaptError, ValueError):
    """A merge whose result would not be what was asked for: NaN, overflow, a delta that is lost."""


class FrozenBaseError(FadaptError, RuntimeError):
    """A gradient was asked for with respect to a frozen base."""


def near(name: str, known: Iterable[str], most: int = 5) -> str:
    """`` Near misses: ...`` for an error message; empty if nothing is close.

    Compares the whole names and their last components, because a pattern is usually a suffix.
    """
    names = sorted(set(known))
    tails = sorted({n.rsplit(".", 1)[-1] for n in names})
    found = get_close_matches(name, tails, most, 0.5) + get_close_matches(name, names, most, 0.5)
    unique = list(dict.fromkeys(found))[:most]
    return f" Near misses: {', '.join(map(repr, unique))}." if unique else ""


def listing(items: Sequence[str], most: int = 8) -> str:
    """``'a', 'b' and 3 more``: the names of a long list that fit into a message."""
    shown = ", ".join(map(repr, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
