"""``fadapt inspect``: what the layers of a model's folder are, and what can be done with them."""

import argparse
from pathlib import Path

from fadapt.describe import describe, table
from fadapt.models import QUANTIZERS, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt inspect``."""
    parser.add_argument("model", type=Path, help="folder of a transformers causal LM")
    parser.add_argument(
        "--base", choices=sorted(QUANTIZERS), default="dense", help="as if it were this format"
    )


def run(arguments: argparse.Namespace) -> int:
    """Load the folder and print the table."""
    model = load_model(arguments.model, arguments.base, "auto", "cpu", 1)
    print(table(describe(model)))
    return 0
