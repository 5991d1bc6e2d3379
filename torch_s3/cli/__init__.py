"""The ``torch-s3`` command."""

from __future__ import annotations

import sys

_NEEDED = ("click", "rich", "typer")


def main() -> None:
    """Run the command that the arguments of the process say, and exit: 0, 1 after an error, 2 for wrong usage, 130
    after Ctrl-C.
    """
    try:
        from torch_s3.cli.app import app
    except ImportError as error:
        if error.name not in _NEEDED:
            raise
        sys.exit(f"torch-s3: {error.name} is not installed: pip install 'torch-s3[cli]'")
    app(prog_name="torch-s3")
