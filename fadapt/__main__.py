"""``python -m fadapt``: the command line."""

from fadapt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
