"""The import rules of the design, read from the sources: layers, and which module may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "xdist").glob("*.py")) if path.stem != "__init__"}
RAY = {"cluster", "launch", "tune"}
HEAVY = {"torch", "ray", "mlflow", "transformers", "sentence_transformers", "datasets", "pyarrow", "numpy", "sklearn", "matplotlib"}


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """Names imported: `ray.data`, `xdist.files`; with `at_import` only what runs when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "xdist" else (node.module,)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (at_import and (for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))):
            waiting += ast.iter_child_nodes(node)


def tops(path: Path, at_import: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, at_import)}


def ours(path: Path, at_import: bool = False) -> set[str]:
    return {name.split(".")[1] for name in imports(path, at_import) if name.startswith("xdist.")}


@pytest.mark.parametrize("name", MODULES)
def test_ray_and_mlflow_stay_where_they_belong(name: str) -> None:
    found = tops(MODULES[name])
    assert "ray" not in found or name in RAY
    assert "mlflow" not in found or name == "track"


@pytest.mark.parametrize("name", MODULES)
def test_importing_a_module_imports_neither_ray_nor_mlflow(name: str) -> None:
    assert not {"ray", "mlflow"} & tops(MODULES[name], at_import=True)


@pytest.mark.parametrize("name", ["config", "recipes", "job", "errors"])
def test_what_help_needs_is_light(name: str) -> None:
    assert not HEAVY & tops(MODULES[name], at_import=True)
    assert ours(MODULES[name], at_import=True) <= {"config", "errors", "overrides", "recipes"}


@pytest.mark.parametrize(
    "name", ["batching", "loss", "metrics", "text", "chunks", "streams", "delimited", "records", "aligned", "formats", "filters"]
)
def test_pure_parts_know_no_cluster(name: str) -> None:
    assert not {"cluster", "corpus", "embed", "train", "tune", "track", "pipeline"} & ours(MODULES[name])


LAYERS = [
    {"errors"},
    {"config"},
    {"recipes", "batching", "loss", "store", "weights", "track", "cluster", "files", "text", "progress", "metrics"},
    {"encoder", "student", "corpus", "checkpoint"},
    {"embed", "evaluate"},
    {"train"},
    {"tune"},
]


def test_imports_go_one_way() -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for name, path in MODULES.items():
        for other in ours(path, at_import=True):
            if name in level and other in level:
                assert level[other] <= level[name], f"{name} imports {other}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: ours(path, at_import=True) & MODULES.keys() for name, path in MODULES.items()}

    def reached(name: str, seen: frozenset[str] = frozenset()) -> None:
        assert name not in seen, f"{name} is part of a cycle: {', '.join(sorted(seen))}"
        for other in graph[name]:
            reached(other, seen | {name})

    for name in graph:
        reached(name)


def test_no_module_is_called_for_what_it_is_not() -> None:
    assert not {"utils", "util", "helpers", "common", "misc", "manager"} & MODULES.keys()


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = f"import sys, xdist; found = {HEAVY!r} & set(sys.modules); assert not found, found"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_are_short_and_light(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    assert tops(path, at_import=True) <= {"xdist", "sys"}
