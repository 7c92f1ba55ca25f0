"""The documentation: its blocks and examples run, its commands parse, nothing is missing."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import alphafpn
import alphafpn.tiny
from alphafpn import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S
)
PUBLIC = [getattr(module, name) for module in (alphafpn, alphafpn.tiny) for name in module.__all__]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, *languages: str) -> Iterator[tuple[int, str]]:
    """Yields fenced blocks in these languages, each with the number of the line before it."""
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            yield text.count("\n", 0, match.start("code")), textwrap.dedent(match["code"])


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the `python` blocks of a page in order, in one module; returns those left out.

    A block that begins by importing a library is left out if that is not installed.
    """
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    left_out = []
    for line, code in blocks(page.read_text("utf-8"), "python"):
        first = re.match(r"(?:import|from) (\w+)", code)
        if first and importlib.util.find_spec(first[1]) is None:
            left_out.append(f"line {line + 1} needs {first[1]}")
            continue
        # Tracebacks show the page's line numbers.
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))
    return left_out


def commands(text: str) -> Iterator[list[str]]:
    """Yields the arguments of the `alphafpn` commands in shell blocks."""
    for _, code in blocks(text, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words and words[0].split("/")[-1] == "alphafpn":
                    yield words[1:]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@every_page
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_and_print_what_is_shown(page, monkeypatch, capsys):
    text = page.read_text("utf-8")
    left_out = run_page(page, monkeypatch)
    printed = capsys.readouterr().out
    if any(blocks(text, "python")):
        assert [code for _, code in blocks(text, "text") if code.rstrip() not in printed] == []
    for picture in re.findall(r'savefig\("(.+?)"', text):
        assert (ROOT / "docs" / "images" / picture).exists(), "draw: python -m benchmarks.pictures"
        assert Path(picture).stat().st_size > 5000
    if left_out:
        pytest.skip(f"ran {page.name} except: {', '.join(left_out)}")


@every_page
def test_blocks_that_would_download_weights_name_what_exists(page):
    for _, code in blocks(page.read_text("utf-8"), "py"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert node.module
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@every_page
def test_commands_parse(page):
    for arguments in commands(page.read_text("utf-8")):
        cli._parser().parse_args(arguments)


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_public_names_have_an_example_that_runs(public):
    if public in (alphafpn.AnchorComparison, alphafpn.AnchorFit):
        pytest.skip("compare_anchors makes these, and shows them")
    module = importlib.import_module(public.__module__)
    examples = doctest.DocTestFinder(recurse=False).find(public, public.__name__, module)
    assert sum(len(example.examples) for example in examples) > 0
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0


def test_the_reference_has_every_public_name_and_says_what_properties_return():
    reference = set(re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M))
    for public in PUBLIC:
        module = "alphafpn.tiny" if public in vars(alphafpn.tiny).values() else "alphafpn"
        assert f"{module}.{public.__name__}" in reference
        for name, member in inspect.getmembers(public, lambda m: isinstance(m, property)):
            assert member.__doc__, f"{public.__name__}.{name}"
            assert inspect.signature(member.fget).return_annotation is not inspect.Signature.empty


def test_the_map_names_the_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = "".join(line for line in text.splitlines() if line.startswith("| `"))
    package = ROOT / "alphafpn"
    files = {*package.glob("*.py"), *(package / "estimate").glob("*.py")}
    assert {path for path in files if not path.name.startswith("__")} == {
        package / name for name in re.findall(r"`([\w/]+\.py)`", rows)
    }
