"""``fadapt sweep``: train many adapters at once on one frozen base."""

import argparse

from fadapt.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt sweep``."""
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one trial a seed")


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep; returns the exit code."""
    raise ConfigError("fadapt sweep is not written yet.")
