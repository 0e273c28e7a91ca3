"""Test the structure of the library: allowed imports between its parts, no cycles of imports, and limits on the length of
files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llama"
MAX_LEVELS = 8  # a part is one level above the highest part that it imports
MAX_TOP_MODULES = 10


def part_of(path: Path) -> str:
    """Return the part that a file belongs to: the name of its package or, at the top of the library, its name without .py."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """Return what a file imports from this library, as pairs of a module's path inside the library and the imported names."""
    imports: list[tuple[str, list[str]]] = []
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            imports.append((".".join([*base, *(node.module or "").split(".")]).strip("."), [a.name for a in node.names]))
    return imports


def import_graph() -> dict[str, set[str]]:
    """Return a dict from each part of the library to the parts that it imports."""
    public = {}  # a dict from each public name of `llama` to the part that defines it
    for module, names in imports_of(PACKAGE / "__init__.py"):
        public.update(dict.fromkeys(names, module.split(".")[0]))
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue
        targets = graph.setdefault(part, set())
        for module, names in imports_of(path):
            targets |= {module.split(".")[0]} if module else {public.get(name, name) for name in names} - {"__version__"}
        targets.discard(part)
    return graph


def test_parts_import_each_other_without_cycles_and_in_at_most_8_levels() -> None:
    graph, level = import_graph(), dict[str, int]()
    while len(level) < len(graph):
        ready = [part for part in graph if part not in level and graph[part] <= level.keys()]
        assert ready, f"a cycle among {sorted(graph.keys() - level.keys())}"
        level |= {part: 1 + max((level[target] for target in graph[part]), default=0) for part in ready}
    assert max(level.values()) <= MAX_LEVELS, level


def test_the_library_has_at_most_10_modules_at_the_top() -> None:
    assert len([*PACKAGE.glob("*.py")]) <= MAX_TOP_MODULES


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("kernels", {"distributed", "model", "engine", "backends"}),  # kernels do not depend on ranks or on a model
        ("layers", {"backends", "engine", "kernels"}),
        ("model", {"kernels", "engine", "backends", "quantization"}),  # the reference model needs no optimized code
        ("tokenizer", {"engine", "model", "distributed"}),
        ("sampling", {"engine", "model", "distributed"}),
        ("engine", {"backends", "checkpoint", "cli"}),
        ("server", {"backends", "checkpoint", "kernels", "layers", "model", "generation", "cli"}),
        ("cli", {"engine", "backends", "checkpoint", "kernels", "layers", "model", "quantization"}),
    ],
)
def test_a_part_does_not_import_parts_that_it_must_not_depend_on(part: str, forbidden: set[str]) -> None:
    """Check that no part imports a forbidden part. The command line may still import names that `llama` exports from forbidden
    parts."""
    if part != "cli":
        assert not import_graph()[part] & forbidden
        return
    modules = {module.split(".")[0] for path in (PACKAGE / "cli").glob("*.py") for module, _ in imports_of(path)}
    assert not modules & forbidden


def test_no_part_imports_private_names_of_another_part() -> None:
    for path in PACKAGE.rglob("*.py"):
        for module, names in imports_of(path):
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private or module.split(".")[0] == part_of(path), (path, private)


def test_no_file_has_more_than_420_lines_or_generation_py_more_than_650() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    limits = {PACKAGE / "generation.py": 650}
    assert not {path: length for path, length in lengths.items() if length > limits.get(path, 420)}


def test_the_server_is_imported_only_by_functions_of_its_command() -> None:
    assert [part for part, targets in import_graph().items() if "server" in targets] == ["cli"]
    for path in (PACKAGE / "cli").glob("*.py"):
        at_the_top = [node.module or "" for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
        assert not [module for module in at_the_top if module.startswith("server")], path
