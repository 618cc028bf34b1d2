"""The package's rooms: imports go down only, in no circle, and what the build reads needs nothing but the standard library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sageattention"
# From the ground up. A folder stands for all its modules.
FLOORS = (
    ("_version", "errors", "memo", "settings", "layout", "precision", "torch_internals"),
    ("tracing", "neutral"),
    ("numerics",),
    ("kernels", "device"),
    ("variants",),
    ("planning",),
    ("backends",),
    ("verify", "dispatch", "sparse_dispatch", "packed_dispatch"),
    ("torch_library",),
    ("api", "sparse", "block_order", "exchange"),
    ("core", "sparge", "sm90_compile", "distributed", ""),  # "" is the package's face
    ("cli",),
    ("__main__",),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    path: path.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("__init__").rstrip("/") for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that one imports, wherever in its text, but for its types alone; of others their first name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    base = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (f"!{alias.name.split('.')[0]}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield f"!{node.module.split('.')[0]}"
        elif isinstance(node, ast.ImportFrom):
            folder = (*base[: len(base) - node.level + 1], *(node.module or "").split("."))
            module = "/".join(filter(None, folder))
            for alias in node.names:
                inner = "/".join(filter(None, (module, alias.name)))
                yield inner if inner in MODULES.values() else module


ARROWS = {name: sorted({i for i in imports(path) if not i.startswith("!") and i != name}) for path, name in MODULES.items()}


def level(module: str) -> int:
    return LEVELS[module.split("/")[0]]


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_a_module_imports_none_of_a_higher_floor(module: str) -> None:
    up = [other for other in ARROWS[module] if level(other) > level(module)]
    assert not up


def test_there_is_no_circle() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names one


@pytest.mark.parametrize("path", [path for path, name in MODULES.items() if name.startswith("kernels")], ids=lambda path: path.stem)
def test_the_table_of_kernels_needs_the_standard_library_alone(path: Path) -> None:
    assert {name[1:] for name in imports(path) if name.startswith("!")} <= set(sys.stdlib_module_names)
