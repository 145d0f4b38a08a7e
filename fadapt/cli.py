"""The command line: ``fadapt <command> ...``, also as ``python -m fadapt``.

A command is a module with ``add_arguments(parser)`` and ``run(arguments) -> int`` (the exit code),
imported only when its command is given: a line in :data:`COMMANDS` adds one. What it raises as a
:class:`FadaptError` or an ``OSError`` becomes one line on stderr and exit code 2.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from fadapt.errors import FadaptError, near

# Command -> (module, one line of help).
COMMANDS = {
    "export": (
        "fadapt.export_folder",
        "write a model and its adapters as one graph: ONNX, .pt2 or AOTInductor",
    ),
    "generate": (
        "fadapt.generate_prompts",
        "continue prompts, each wearing its own adapter, batch by batch",
    ),
    "inspect": (
        "fadapt.inspect_folder",
        "what each layer of a model is, and what works on it",
    ),
    "merge": ("fadapt.merge_folder", "merge adapters into a model of any size, layer by layer"),
    "sweep": ("fadapt.sweep", "train many adapters at once on one frozen base, best first"),
    "train": ("fadapt.train", "train one adapter, a fresh one or one from a PEFT folder"),
}
# What a module of ours may lack -> the extra that brings it.
_EXTRAS = {
    "transformers": "cli",
    "rich": "cli",
    "matplotlib": "cli",
    "yaml": "cli",
    "torchao": "torchao",
    "safetensors": "peft",
    "aqlm": "aqlm",
    "neural_compressor": "inc",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors name near misses; flags may not be shortened."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """One line with near misses, and exit code 2."""
        if found := re.search(r"unrecognized arguments: (.*)", message):
            flags = [w.split("=")[0] for w in found[1].split() if w.startswith("-")]
            message += f".{near(flags[0], self.flags())}" if flags else ""
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")

    def flags(self) -> list[str]:
        """Every flag of this parser, dashes included."""
        return [flag for action in self._actions for flag in action.option_strings]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit code: 0, or 2 after an error that was told in one line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name = words[0]
    if name == "--version":
        from fadapt import __version__

        print(f"fadapt {__version__}")
        return 0
    if name not in COMMANDS:
        return _complain("fadapt", f"there is no command {name!r}.{_hint(name)}")
    path, summary = COMMANDS[name]
    prog = f"fadapt {name}"
    try:
        module = importlib.import_module(path)
        parser = Parser(prog, summary)
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(words[1:]))
        return code
    except BrokenPipeError:  # the reader of our output has gone: nobody to tell
        return 141
    except KeyboardInterrupt:
        return _complain(prog, "stopped.", code=130)
    except (FadaptError, OSError) as error:
        return _complain(prog, " ".join(str(error).split()))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        wanted = f'pip install "fadapt[{extra}]"'
        return _complain(prog, f"{error.name} is not installed. Install it with: {wanted}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fadapt COMMAND [--help] [...]",
            "",
            "Functional adapters over frozen, quantized bases.",
            "",
            *lines,
        ]
    )


def _hint(name: str, known: Iterable[str] = COMMANDS) -> str:
    return near(name, known) or f" Commands: {', '.join(known)}."


def _complain(prog: str, message: str, code: int = 2) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return code
