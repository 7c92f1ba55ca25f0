"""Imports run one way: each module imports only what lies below it, wherever the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "alphafpn"

# From the lowest to the highest: a module may import those that are listed before it.
LAYERS = [
    "alphafpn.display",
    "alphafpn.estimate.checks",
    "alphafpn.estimate.resize",
    "alphafpn.estimate.probe",
    "alphafpn.estimate.grids",
    "alphafpn.estimate.anchor_layout",
    "alphafpn.estimate.distinct",
    "alphafpn.estimate.search",
    "alphafpn.estimate.fcos",
    "alphafpn.estimate.matcher",
    "alphafpn.estimate.annotations",
    "alphafpn.estimate.coco",
    "alphafpn.estimate.level_statistics",
    "alphafpn.estimate.report",
    "alphafpn.estimate.picture",
    "alphafpn.estimate.alpha_estimate",
    "alphafpn.estimate.counting",
    "alphafpn.estimate.s_alpha",
    "alphafpn.estimate.for_detector",
    "alphafpn.pyramid",
    "alphafpn.adapt",
    "alphafpn.estimate",
    "alphafpn.comparison",
    "alphafpn.surgery",
    "alphafpn.gradients",
    "alphafpn",
    "alphafpn.tiny._coco",
    "alphafpn.tiny._box_transform",
    "alphafpn.tiny.detectors",
    "alphafpn.tiny.erasing",
    "alphafpn.tiny.evaluation",
    "alphafpn.tiny.scale_match",
    "alphafpn.tiny.tiling",
    "alphafpn.tiny",
    "alphafpn.demo.scenes",
    "alphafpn.demo.own",
    "alphafpn.demo.detector",
    "alphafpn.demo.training",
    "alphafpn.demo.picture",
    "alphafpn.demo.run",
    "alphafpn.demo",
    "alphafpn.cli",
    "alphafpn.__main__",
]

# What may be imported inside a function: what an extra brings, and what is slow and seldom needed.
LATE = {
    "matplotlib",
    "PIL",
    "faster_coco_eval",
    "alphafpn.tiny",
    "alphafpn.demo",
    "torchvision.transforms.v2.functional",
}


class Import(NamedTuple):
    """An import statement of one name.

    Attributes:
        module: The module that imports.
        line: Where in its file.
        target: The module that is imported.
        late: Whether it stands inside a function.
    """

    module: str
    line: int
    target: str
    late: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, path: Path, source: str) -> Iterator[Import]:
    """All imports of a file, those in functions and under `TYPE_CHECKING` too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(source)
    late = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in FILES else base for name in names]
        else:
            continue
        for target in targets:
            yield Import(module, node.lineno, target, node in late)


@pytest.fixture(scope="module")
def found() -> list[Import]:
    return [i for name, path in FILES.items() for i in imports_of(name, path, path.read_text())]


def test_each_module_has_its_place():
    assert sorted(LAYERS) == sorted(FILES)


def test_imports_lead_down_and_so_in_no_circle(found):
    place = {module: i for i, module in enumerate(LAYERS)}
    inside = [i for i in found if i.target.partition(".")[0] == "alphafpn"]
    assert len(inside) > len(FILES)
    assert {i.target for i in inside} <= place.keys()
    assert [i for i in inside if place[i.target] >= place[i.module]] == []


def test_the_estimate_knows_no_pyramid(found):
    core = [i for i in found if i.module.startswith("alphafpn.estimate")]
    assert {
        i.target for i in core if i.target.startswith("alphafpn") and "estimate" not in i.target
    } == {"alphafpn.display"}


def test_imports_in_functions_are_of_what_may_be_missing_or_is_slow(found):
    def allowed(target: str) -> bool:
        return any(target == name or target.startswith(f"{name}.") for name in LATE)

    assert [i for i in found if i.late and not allowed(i.target)] == []


def test_nothing_is_imported_by_a_name_made_at_run_time():
    for path in FILES.values():
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & {"__import__", "importlib"}, path


def test_every_kind_of_import_is_seen():
    source = """
import alphafpn.cli, os
from alphafpn import surgery, fold_alpha
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .layout import AnchorLayout
def f():
    from .. import counting
    class C:
        from ..result.report import summary
"""
    path = PACKAGE / "estimate" / "anchors" / "grids.py"
    assert sorted(
        (i.target, i.late) for i in imports_of(name_of(path), path, source) if i.target != "typing"
    ) == [
        ("alphafpn", False),
        ("alphafpn.cli", False),
        ("alphafpn.estimate.anchor_layout", False),
        ("alphafpn.estimate.counting", True),
        ("alphafpn.estimate.report", True),
        ("alphafpn.surgery", False),
        ("os", False),
    ]
