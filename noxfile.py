"""Runs the tests with the oldest supported torch and torchvision, and with the current ones."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"

PAIRS = {
    "oldest": ["torch==2.6.0", "torchvision==0.21.0"],
    "current": ["torch", "torchvision"],
}


@nox.session
@nox.parametrize("pair", list(PAIRS), ids=list(PAIRS))
def tests(session: nox.Session, pair: str) -> None:
    """The test suite, without the ecosystem's libraries: `nox -s "tests(oldest)"`."""
    session.install(*PAIRS[pair], "-e", ".[test]")
    session.run("pip", "show", "torch", "torchvision")  # which versions the log is about
    session.run("pytest", *session.posargs)


@nox.session
def ecosystem(session: nox.Session) -> None:
    """The tests that need the ecosystem's libraries, with all of them at their current versions."""
    session.install("-e", ".[test,ecosystem]")
    session.run("pytest", *(session.posargs or ("tests/ecosystem", "tests/test_docs.py")))
