"""``nox`` lints, checks types and tests; ``nox -s reliability`` tests for longer; ``nox -s demo`` trains a model;
``nox -s bench`` measures.

What follows ``--`` goes to the tool: ``nox -s tests -- -k checkpoint``.
"""

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2026.10"
nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = "--constraint=constraints.txt"
SHARED = Path(".nox", "torch").absolute()


def run_with_torch(session: nox.Session, extra: str, *command: str) -> None:
    """Run ``python *command`` with ``torch-s3[extra]`` installed.

    All sessions that need torch share this environment, since torch takes 5 GB. It is made and installed into when
    that is missing or older than the files that say what is needed; the package itself is always as in the checkout.
    """
    python = SHARED / "bin" / "python"
    installed = SHARED / f"has-{extra}"
    sources = [Path("pyproject.toml"), Path("constraints.txt")]
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(SHARED))
    if not installed.exists() or installed.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        session.log(f"Installing torch-s3[{extra}]. The first time, torch is downloaded: this takes minutes.")
        session.run(str(python), "-m", "pip", "install", "--quiet", f"--editable=.[{extra}]", CONSTRAINTS)
        installed.touch()
    session.run(str(python), *command)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check the rules of ruff, and the format."""
    session.install("ruff", CONSTRAINTS)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types with mypy, strictly."""
    run_with_torch(session, "dev", "-m", "mypy", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests, against servers on this machine, in up to four processes."""
    side_by_side = ("--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile")
    run_with_torch(session, "test", "-m", "pytest", *side_by_side, *session.posargs)


@nox.session(venv_backend="none")
def reliability(session: nox.Session) -> None:
    """Do 10,000 operations under faults, then 100,000 GETs: minutes. ``-- --seed 7`` repeats a run."""
    for options in [session.posargs] if session.posargs else [[], ["--soak", "100000"]]:
        run_with_torch(session, "test", "tests/reliability.py", *options)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train on handwritten digits from an S3 of its own, or on your bucket."""
    run_with_torch(session, "demo", "examples/train_images.py", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Compare with other clients: ``-- images --weather``; the benchmark's name is that of a module in benchmarks/."""
    named = session.posargs and not session.posargs[0].startswith("-")
    name, *options = session.posargs if named else ["transport", *session.posargs]
    run_with_torch(session, "bench", "-m", f"benchmarks.{name}", *options)
