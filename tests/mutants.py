"""Breaks the core in one place at a time, and shows which changes no test notices.

`python -m tests.mutants FOLDER` copies the tree to FOLDER, finds which tests reach which line, and
runs a random sample of mutants, each against the tests that reach its line. A second call with the
same folder goes on where the first one ended. Annotations, decorators, `raise` statements and
`zip(strict=)` stay as they are: a change there alters no behaviour that a test should hold.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest
import torchvision  # noqa: F401  (once, for all forks)

ROOT = Path(__file__).resolve().parents[1]
CORE = ("*.py", "estimate/**/*.py")
MODULES = ("cli", "display", "equivalence", "gradients", "imports", "pyramid", "surgery")
TESTS = ["tests/estimate", *(f"tests/test_{name}.py" for name in MODULES)]
ENOUGH = 0.95
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


def passes(folder: Path, *options: str, limit: float = math.inf) -> bool:
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
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(status)
    # Codes above 2 are a mistake in this call; 2 is a test module that cannot be imported, and 4 a
    # conftest that cannot. A signal is the mutant's doing.
    if code > 4 or code == 3:
        raise RuntimeError(f"pytest left with {code}: {(folder / 'log.txt').read_text()[-2000:]}")
    return code == 0


def state() -> str:
    """Names what the mutants are made of and what runs against them, by its content."""
    paths = sorted(p for part in ("alphafpn", "tests") for p in (ROOT / part).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def prepare(folder: Path) -> dict[str, float]:
    """Copies the tree, runs the suite once with each line's tests, and returns their seconds."""
    if not (folder / "times.xml").exists():
        ignored = shutil.ignore_patterns(".*", "__pycache__", "site", "dist")
        shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
        options = ["-n", "2", "--cov=alphafpn", "--cov-context=test", "--cov-report="]
        if not passes(folder, *options, "--junitxml=part.xml", *TESTS):
            raise RuntimeError("the suite fails before anything is changed")
        (folder / "state.txt").write_text(state())
        (folder / "part.xml").rename(folder / "times.xml")
    if (folder / "state.txt").read_text() != state():
        raise RuntimeError(f"{folder} is of another state of the tree: give a new folder")
    cases = ElementTree.parse(folder / "times.xml").iter("testcase")
    return {f"{c.get('classname')}.{c.get('name')}": float(c.get("time", 0)) for c in cases}


def name_of(test: str) -> str:
    """Turns pytest's id of a test into its name in the report."""
    return test.replace("/", ".").replace(".py::", ".").replace("::", ".")


def reaching(folder: Path, path: Path, seconds: dict[str, float]) -> dict[int, list[str]]:
    """Maps each line of a module to the tests that reach it: the module's own, then the fastest.

    What runs when the module is imported is reached by all of the module's tests.
    """
    data = coverage.CoverageData(str(folder / ".coverage"))
    data.read()
    contexts = data.contexts_by_lineno(str(folder / path))
    found = {
        line: {context.partition("|")[0] for context in part} - {""}
        for line, part in contexts.items()
    }
    every = set().union(*found.values())

    def order(test: str) -> tuple[bool, float]:
        return f"/test_{path.stem}.py" not in test, seconds.get(name_of(test), 0.0)

    return {line: sorted(tests or every, key=order) for line, tests in found.items()}


def main() -> None:
    """Runs the sample, prints who survives, and leaves with 1 if too many do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.resolve()
    seconds = prepare(folder)
    paths = sorted(p.relative_to(folder) for glob in CORE for p in (folder / "alphafpn").glob(glob))
    for path in paths:  # of a call that was killed, one is still broken
        shutil.copy(ROOT / path, folder / path)
    if not passes(folder, *TESTS[1:]):
        raise RuntimeError(f"unchanged, the copy fails: see {folder / 'log.txt'}")
    everything = [(path, *mutant) for path in paths for mutant in mutants(folder / path)]
    sample = random.Random(options.seed).sample(everything, options.count)
    results = folder / f"mutants-{options.count}-{options.seed}.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    for path, line, change, source in sample[len(done) :]:
        tests = reaching(folder, path, seconds).get(line, [])[:400]
        # Ten times what the tests took: one that hangs is noticed, one that is slow is not dead.
        limit = 60 + 10 * sum(seconds.get(name_of(test), 0.0) for test in tests)
        original = (ROOT / path).read_text()
        (folder / path).write_text(source)
        try:
            phases = "--hypothesis-profile=mutants"
            alive = not tests or passes(folder, "-x", phases, *tests, limit=limit)
        finally:
            (folder / path).write_text(original)
        done.append({"place": f"{path}:{line}", "change": change, "alive": alive})
        with results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{len(done)}/{len(sample)}", "ALIVE" if alive else "dead", done[-1], flush=True)
    survivors = [mutant for mutant in done if mutant["alive"]]
    print(f"{len(done) - len(survivors)} of {len(done)} mutants of {len(everything)} died")
    for mutant in survivors:
        print(f"  {mutant['place']}: {mutant['change']}")
    sys.exit(len(survivors) > (1 - ENOUGH) * len(done))


if __name__ == "__main__":
    main()
