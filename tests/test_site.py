"""The built site, as far as `mkdocs build --strict` does not check it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")
pytest.importorskip("l2m4m")

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("no documentation here to build", allow_module_level=True)

ELSEWHERE = r"\s*[\"']?\s*(?:https?:)?//"
LOADED = {
    ".html": re.compile(
        r"<(?!a\b)\w+\b[^>]*\s(?:src|srcset|href|data|poster|background)=" + ELSEWHERE, re.I
    ),
    ".css": re.compile(r"(?:url\(|@import|image-set\()" + ELSEWHERE, re.I),
    ".svg": re.compile(r"<(?!a\b)\w+\b[^>]*\s(?:xlink:)?href=" + ELSEWHERE, re.I),
}
CODE = re.compile(r"<(code|script|style|math)\b.*?</\1>", re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_nothing_is_loaded_from_another_host(site):
    paths = [path for path in site.rglob("*") if path.suffix in LOADED]
    assert {path.suffix for path in paths} >= {".html", ".css"}
    loads = {
        str(path.relative_to(site)): LOADED[path.suffix].findall(path.read_text()) for path in paths
    }
    assert {name: found for name, found in loads.items() if found} == {}


def test_formulas_are_rendered(site):
    assert (site / "how-it-works" / "index.html").read_text().count("<math") > 10
    for path in site.rglob("*.html"):
        text = re.sub("<[^>]*>", "", CODE.sub("", path.read_text()))
        assert not re.findall(r"\\[a-zA-Z(\[]|\$", text), path
