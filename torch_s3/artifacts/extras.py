"""Packages that come with the extras of ours."""

from __future__ import annotations

import importlib
from typing import Any


def needed(package: str, *, extra: str, by: str) -> Any:
    """Import a package.

    Args:
        package: Its name.
        extra: Of ours, which brings it.
        by: What needs it.

    Raises:
        ImportError: It isn't installed; the message says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing, asked = (error.name or "").partition(".")[0], package.partition(".")[0]
        if missing not in (asked, extra):
            raise  # it is there, but lacks something of its own
        message = f"{by} needs {package if missing == asked else missing}: pip install 'torch-s3[{extra}]'"
        raise ImportError(message, name=package) from None
