"""Runs the tests with the oldest and the current torch, on what is shipped, and on mutants."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

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


@nox.session
def clients(session: nox.Session) -> None:
    """What people pass in: detectors, modules, data sets and files of other libraries."""
    session.install("-e", ".[test,ecosystem]", "deepforest>=2", "torchgeo>=0.8")
    session.run("pytest", *(session.posargs or ("tests/clients",)))


@nox.session
def package(session: nox.Session) -> None:
    """Builds sdist and wheel, and tries the wheel alone in a clean environment."""
    out = Path(session.create_tmp()).resolve()
    wheel, _ = _build(session, out)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    others = {name.split("/")[0] for name in names if ".dist-info/" not in name} - {"alphafpn"}
    if others or "alphafpn/py.typed" not in names:
        session.error(f"{wheel.name}: expected alphafpn alone, with py.typed; also found {others}")

    session.install(str(wheel))
    annotations = out / "annotations.json"
    annotations.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "width": 640, "height": 480}],
                "annotations": [
                    {"image_id": 1, "category_id": 1, "bbox": [10, 10, side, side]}
                    for side in (20, 30, 60, 70, 130)
                ],
            }
        )
    )
    with session.chdir(out):  # away from the source, so that only the wheel can be imported
        session.run("python", "-c", "from alphafpn import *")
        session.run("alphafpn", "--version")
        detector = "fasterrcnn_resnet50_fpn_v2"
        session.run("alphafpn", "estimate", str(annotations), "--detector", detector)


@nox.session
def sdist(session: nox.Session) -> None:
    """Runs the tests of the sdist on the wheel that is built from it."""
    out = Path(session.create_tmp()).resolve()
    wheel, sdist = _build(session, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    session.install(f"{wheel}[test]")
    with session.chdir(out / sdist.name.removesuffix(".tar.gz")):
        session.run("pytest", "-n", "2", *session.posargs)


def _build(session: nox.Session, out: Path) -> tuple[Path, Path]:
    """Builds the wheel and the sdist, and returns their paths."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(out / "dist"))
    (wheel,), (sdist,) = (out / "dist").glob("*.whl"), (out / "dist").glob("*.tar.gz")
    return wheel, sdist


@nox.session
def mutants(session: nox.Session) -> None:
    """Breaks the core in 200 random places, and expects the tests to notice 95 % of them."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.mutants", *(session.posargs or (session.create_tmp(),)))
