"""Breaks the core in one place at a time, and shows which changes no test notices.

`python -m tests.mutants FOLDER` copies the tree to FOLDER, finds which tests reach
which line, and runs a random sample of mutants, each against the tests that reach its line.
Annotations, decorators, `raise` statements and `zip(strict=)` stay as they are: a change there
alters no behaviour that a test should hold.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import copy
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest
import torchvision  # noqa: F401  (once, for all forks)

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("adapt", "cli", "comparison", "display", "gradients", "pyramid", "surgery")
TESTS = [
    "tests/estimate",
    "tests/test_equivalence.py",
    *(str(p.relative_to(ROOT)) for n in MODULES for p in ROOT.glob(f"tests/test_{n}*.py")),
]
ENOUGH = 0.95
SECONDS = 600  # a mutant that takes longer hangs, and so is noticed
PAIRS = [
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod),
    (ast.BitOr, ast.BitAnd), (ast.LShift, ast.RShift), (ast.And, ast.Or),
]  # fmt: skip
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Pow: ast.Mult, **dict(PAIRS), **{b: a for a, b in PAIRS}
}  # fmt: skip


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what may stand in place of `node`."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Yields owner, field, index in the field, and node, for each part that may be replaced."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, part in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(part, ast.AST) or isinstance(part, ast.Raise):
                continue
            if isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING":
                continue
            if isinstance(part, ast.keyword) and part.arg == "strict":
                continue
            yield node, field, i if isinstance(value, list) else None, part
            yield from places(part)


def mutants(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line, change and source of each mutant of a module."""
    tree = ast.parse(path.read_text())
    for owner, field, i, old in list(places(tree)):
        for new in changed(old):
            _put(owner, field, i, new)
            before, after = (ast.unparse(part).split("\n")[0] for part in (old, new))
            source = ast.unparse(ast.fix_missing_locations(tree))
            yield getattr(old, "lineno", 0), f"{before}  ->  {after}", source
            _put(owner, field, i, old)


def _put(owner: ast.AST, field: str, i: int | None, part: ast.AST) -> None:
    if i is None:
        setattr(owner, field, part)
    else:
        getattr(owner, field)[i] = part


def passes(folder: Path, *options: str, limit: float) -> bool:
    """Whether pytest passes in `folder`: in a fork, which finds torch imported already."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        # Those of the tree that is left alone: pytest would refuse the copy's tests beside them.
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        with open("log.txt", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os._exit(int(pytest.main(["-q", "-p", "no:cacheprovider", *options])))
    end = time.monotonic() + limit
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(done[1])
    # 2 is a test module that cannot be imported, and 4 a conftest that cannot; a signal is the
    # mutant's doing. All else above 1 is a mistake in this call.
    if code > 4 or code == 3:
        raise RuntimeError(f"pytest left with {code}: {(folder / 'log.txt').read_text()[-2000:]}")
    return code == 0


def reaching(data: coverage.CoverageData, path: Path, line: int) -> list[str]:
    """Returns the tests that reach a line of a module, those named after the module first.

    What no test reaches runs when the module is imported, or in a process of its own: then all
    tests of the module are tried.
    """
    contexts = data.contexts_by_lineno(str(path))
    tests = {
        number: {context.partition("|")[0] for context in found} - {""}
        for number, found in contexts.items()
    }
    if found := tests.get(line):
        return sorted(found, key=lambda test: (f"/test_{path.stem}" not in test, test))
    named = [str(file.relative_to(ROOT)) for file in ROOT.glob(f"tests/**/test_{path.stem}*.py")]
    return [*named, *sorted(set().union(*tests.values()))]


def survives(folder: Path, name: str, source: str, tests: list[str]) -> bool:
    """Whether tests pass with another source of a module, in this process's copy of the tree."""
    own = folder.with_name(f"tree-{os.getpid()}")
    if not own.exists():
        shutil.copytree(folder, own)
    path = own / name
    original = path.read_text()
    path.write_text(source)
    alive = passes(own, "-x", "--hypothesis-profile=mutants", *tests[:400], limit=SECONDS)
    path.write_text(original)
    return alive


def main() -> None:
    """Runs the sample, prints who survives, and leaves with 1 if too many do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder.resolve() / "tree"
    for old in options.folder.glob("tree*"):
        shutil.rmtree(old)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
    measured = ["--cov=alphafpn", "--cov-context=test", "--cov-report="]
    if not passes(folder, "-n", str(options.jobs), *measured, *TESTS, limit=3600):
        sys.exit(f"the suite fails before anything is changed: see {folder / 'log.txt'}")
    data = coverage.CoverageData(str(folder / ".coverage"))
    data.read()
    core = [*(folder / "alphafpn").glob("*.py"), *(folder / "alphafpn" / "estimate").glob("*.py")]
    everything = [(path, *mutant) for path in sorted(core) for mutant in mutants(path)]
    sample = random.Random(options.seed).sample(everything, options.count)
    fork = multiprocessing.get_context("fork")
    survivors = []
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=fork) as pool:
        running = [
            pool.submit(
                survives, folder, str(path.relative_to(folder)), source, reaching(data, path, line)
            )
            for path, line, _, source in sample
        ]
        for number, (path, line, change, _) in enumerate(sample):
            alive = running[number].result()
            place = f"{path.relative_to(folder)}:{line}: {change}"
            survivors += [place] * alive
            print(f"{number + 1}/{len(sample)}", "ALIVE" if alive else "dead", place, flush=True)
    print(f"{len(sample) - len(survivors)} of {len(sample)} mutants of {len(everything)} died")
    print(*survivors, sep="\n")
    sys.exit(len(survivors) > (1 - ENOUGH) * len(sample))


if __name__ == "__main__":
    main()
