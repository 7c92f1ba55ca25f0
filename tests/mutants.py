"""Breaks the core in one place at a time, and shows which changes no test notices.

`python -m tests.mutants FOLDER` copies the tree to FOLDER, finds which tests reach which line, and
runs each mutant against those that reach its line. A second call with the same folder goes on
where the first one ended. Error messages, annotations, docstrings, decorators and `zip`'s `strict`
are left alone: changing them changes no behaviour that a test should hold.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from coverage.numbits import numbits_to_nums

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/estimate", *(f"tests/test_{name}.py" for name in
    ("cli", "equivalence", "gradients", "imports", "pyramid", "surgery"))]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or,
    ast.Or: ast.And, ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "keywords of a class"}


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what may stand in place of `node`."""
    if type(node) in SWAPS and isinstance(node, ast.stmt):
        yield SWAPS[type(node)]()
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        changed = copy.copy(node)
        changed.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
        yield changed
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            changed_compare = copy.copy(node)
            changed_compare.ops = [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]]  # type: ignore[list-item]
            yield changed_compare
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield ast.Constant(not value if isinstance(value, bool) else value + 1)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        changed_test = copy.copy(node)
        changed_test.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed_test
    if isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yields where below `node` a part may be replaced: its owner, field and index in a list."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        if isinstance(node, ast.ClassDef) and field == "keywords":
            continue
        for i, part in enumerate(value if isinstance(value, list) else [value]):
            texts = isinstance(part, ast.BinOp) and any(
                isinstance(x, ast.JoinedStr) or isinstance(getattr(x, "value", None), str)
                for x in ast.walk(part)
            )
            names = [getattr(t, "id", "") for t in getattr(part, "targets", [])]
            if (
                not isinstance(part, ast.AST)
                or isinstance(part, ast.Raise | ast.AnnAssign | ast.Import | ast.ImportFrom)
                or texts
                or "__all__" in names
                or (isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING")
                or (isinstance(part, ast.keyword) and part.arg == "strict")
            ):
                continue
            yield node, field, i if isinstance(value, list) else None
            yield from places(part)


def mutants(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line, change and the whole new source for each mutant of a module."""
    tree = ast.parse(path.read_text())
    for owner, field, i in list(places(tree)):
        held = getattr(owner, field)
        old = held if i is None else held[i]
        line = getattr(old, "lineno", 0)
        for new in replacements(old):
            if i is None:
                setattr(owner, field, new)
            else:
                held[i] = new
            before, after = (ast.unparse(part).split("\n")[0] for part in (old, new))
            yield line, f"{before}  ->  {after}", ast.unparse(ast.fix_missing_locations(tree))
            if i is None:
                setattr(owner, field, old)
            else:
                held[i] = old


def pytest(folder: Path, *options: str, limit: float | None = None) -> int:
    """Runs the tests in `folder`; a run beyond `limit` seconds counts as failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    try:
        run = subprocess.run(command, cwd=folder, timeout=limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return 1
    # 2 is an error while the tests are collected, as after a mutant that breaks an import.
    if run.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest left with {run.returncode}: {run.stdout[-2000:]}{run.stderr}")
    return run.returncode


def prepare(folder: Path) -> None:
    """Copies the tree, and runs the suite once to see which tests reach which line, how fast."""
    for name in ("alphafpn", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    options = ["-n", "2", "--cov=alphafpn", "--cov-context=test", "--junitxml=times.xml"]
    if pytest(folder, *options, "--cov-report=", *TESTS):
        raise RuntimeError("the suite fails before anything is changed")


def reaching(folder: Path, path: Path) -> dict[int, list[str]]:
    """Maps each line of a module to the tests that reach it."""
    found: dict[int, list[str]] = {}
    with sqlite3.connect(folder / ".coverage") as data:
        rows = data.execute(
            "select c.context, a.fromno, a.tono from arc a join file f on f.id = a.file_id"
            " join context c on c.id = a.context_id where f.path = ?",
            (str(folder / path),),
        )
        for context, *ends in rows:
            test = context.partition("|")[0]
            for line in ends:
                if test and test not in found.setdefault(line, []):
                    found[line].append(test)
    return found
