"""How the library is divided: which part imports which."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llama"
MAX_LEVELS = 8
MAX_TOP_MODULES = 10


def part_of(path: Path) -> str:
    """A part is a package, or a module at the top."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> list[tuple[str, list[str]]]:
    """What a file imports from this library: paths of modules, relative to it, and the names taken from them."""
    found: list[tuple[str, list[str]]] = []
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            found.append((".".join([*base, *(node.module or "").split(".")]).strip("."), [a.name for a in node.names]))
    return found


def arrows() -> dict[str, set[str]]:
    """For each part, the parts that it imports."""
    public = {}  # where the names of `llama` itself come from
    for module, names in imported(PACKAGE / "__init__.py"):
        public.update(dict.fromkeys(names, module.split(".")[0]))
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        if part in ("__init__", "__main__", "_demo"):
            continue
        targets = graph.setdefault(part, set())
        for module, names in imported(path):
            targets |= {module.split(".")[0]} if module else {public.get(name, name) for name in names} - {"__version__"}
        targets.discard(part)
    return graph


def test_parts_import_each_other_in_few_levels_and_without_circles() -> None:
    graph, level = arrows(), dict[str, int]()
    while len(level) < len(graph):
        ready = [part for part in graph if part not in level and graph[part] <= level.keys()]
        assert ready, f"a circle among {sorted(graph.keys() - level.keys())}"
        level |= {part: 1 + max((level[target] for target in graph[part]), default=0) for part in ready}
    assert max(level.values()) <= MAX_LEVELS, level


def test_few_modules_lie_at_the_top() -> None:
    assert len([*PACKAGE.glob("*.py")]) <= MAX_TOP_MODULES


@pytest.mark.parametrize(
    ("part", "others"),
    [
        ("kernels", {"distributed", "model", "engine", "backends"}),  # kernels compute, on one rank, for any model
        ("layers", {"backends", "engine", "kernels"}),
        ("model", {"kernels", "engine", "backends", "quantization"}),  # the reference knows nothing of the fast ways
        ("tokenizer", {"engine", "model", "distributed"}),
        ("sampling", {"engine", "model", "distributed"}),
        ("engine", {"backends", "checkpoint", "cli"}),
        ("cli", {"engine", "backends", "checkpoint", "kernels", "layers", "model", "quantization"}),
    ],
)
def test_a_part_does_not_know_others(part: str, others: set[str]) -> None:
    if part != "cli":
        assert not arrows()[part] & others
        return
    modules = {module.split(".")[0] for path in (PACKAGE / "cli").glob("*.py") for module, _ in imported(path)}
    assert not modules & others  # names that `llama` itself exports are public


def test_no_part_takes_private_names_of_another() -> None:
    for path in PACKAGE.rglob("*.py"):
        for module, names in imported(path):
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private or module.split(".")[0] == part_of(path), (path, private)


def test_no_file_of_the_library_is_long() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert all(length <= 420 for name, length in lengths.items() if name != "generation.py"), lengths
