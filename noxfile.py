"""``nox`` lints, type-checks and tests. ``nox -s demo`` trains a model, ``nox -s bench`` measures."""

from pathlib import Path

import nox


nox.needs_version = ">=2026.10"
nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = "--constraint=constraints.txt"


@nox.session(default=False, reuse_venv=True)
def env(session: nox.Session) -> None:
    """Make the environment that the sessions below share, for torch takes 5 GB."""
    session.install("--editable=.[bench,dev,test]", CONSTRAINTS)
