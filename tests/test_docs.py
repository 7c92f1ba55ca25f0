"""The documentation: blocks and examples run, `alphafpn` commands parse, nothing is left out."""

from __future__ import annotations

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
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()
]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S
)


def blocks(text: str, *languages: str) -> Iterator[tuple[int, str]]:
    """Fenced blocks in these languages, each with the number of the line before its first."""
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            yield text.count("\n", 0, match.start("code")), textwrap.dedent(match["code"])


def missing_library(code: str) -> str | None:
    """The library that the block opens by importing, where it is not installed."""
    found = re.match(r"(?:import|from) (\w+)", code)
    return found[1] if found and importlib.util.find_spec(found[1]) is None else None


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the Python blocks of a page in order, in one module; returns what was left out."""
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    left_out = []
    for line, code in blocks(page.read_text("utf-8"), "python"):
        library = missing_library(code)
        if library:
            left_out.append(f"line {line + 1} needs {library}")
            continue
        # Line numbers in tracebacks, and sources that are looked up, are the page's.
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))
    return left_out


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of the `alphafpn` commands in shell blocks."""
    for _, code in blocks(text, "bash", "console", "sh", "shell"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            ends = [i for i, word in enumerate(words) if word in {"|", ">", "&&", ";"}]
            words = words[: ends[0]] if ends else words
            if words[:1] == ["alphafpn"]:
                yield words[1:]
            elif words[1:3] == ["-m", "alphafpn"]:
                yield words[3:]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(page, monkeypatch):
    left_out = run_page(page, monkeypatch)
    saved = re.findall(r'savefig\("(.+?)"', page.read_text("utf-8"))
    for picture in saved:
        assert (ROOT / "docs" / "images" / picture).exists(), "draw: python -m benchmarks.pictures"
        assert Path(picture).stat().st_size > 5000
    if left_out:
        pytest.skip(f"ran {page.name} except: {', '.join(left_out)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for arguments in commands(page.read_text("utf-8")):
        code: object = 0
        try:
            cli._parser().parse_args(arguments)
        except SystemExit as stop:  # --help and --version end with 0
            code = stop.code
        assert code == 0, arguments


def test_the_worked_example_shows_what_it_prints(monkeypatch, capsys):
    text = (ROOT / "docs" / "worked-example.md").read_text("utf-8")
    shown = [code.rstrip() for _, code in blocks(text, "text")]
    python = [code for _, code in blocks(text, "python")]
    end = next(i for i, code in enumerate(python) if "summary()" in code)
    exec("\n".join(python[: end + 1]), {})
    printed = capsys.readouterr().out
    assert shown
    assert [block for block in shown if block not in printed] == []


PUBLIC = [getattr(module, name) for module in (alphafpn, alphafpn.tiny) for name in module.__all__]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_public_names_have_an_example_that_runs(public):
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


# The checker itself


def test_a_block_sees_those_before_it_and_failures_name_the_line(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n```python\nx = 1\n```\n\n```text\nnot python\n```\n```python\nassert x == 2\n```\n"
    )
    with pytest.raises(AssertionError) as failure:
        run_page(page, monkeypatch)
    assert failure.traceback[-1].lineno + 1 == 10
    page.write_text(page.read_text().replace("x = 1", "x = 2"))
    assert run_page(page, monkeypatch) == []


def test_only_a_block_that_opens_with_a_missing_library_is_left_out(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport no_such_library\nraise ValueError\n```\n")
    assert run_page(page, monkeypatch) == ["line 2 needs no_such_library"]
    page.write_text("```python\nx = 1\nimport no_such_library\n```\n")
    with pytest.raises(ModuleNotFoundError):
        run_page(page, monkeypatch)


def test_commands_are_found_in_shell_blocks():
    text = (
        "```bash\n$ alphafpn demo --out a  # why\nalphafpn estimate \\\n  b.json > c\nls\n```\n"
        "    ```bash\n    python -m alphafpn demo | tail\n    ```\n```text\nalphafpn no\n```\n"
    )
    assert list(commands(text)) == [["demo", "--out", "a"], ["estimate", "b.json"], ["demo"]]
