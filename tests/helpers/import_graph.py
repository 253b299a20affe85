"""Which module of the project imports which, read from the source: nothing is imported to find out."""

import ast
import pathlib
from collections.abc import Iterable, Mapping

ROOT = pathlib.Path(__file__).parents[2]


def module_name(path: pathlib.Path) -> str:
    """fvq_jax.ops.nearest of fvq_jax/ops/nearest.py; a package is called after its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> dict[str, str]:
    """The source of every module below these folders, by name."""
    return {module_name(path): path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")}


def imports(source: str, known: Iterable[str]) -> set[str]:
    """The modules among `known` that a source imports anywhere, also inside functions and for type checkers only."""
    known, found = set(known), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            # `from package import module` imports the module, `from module import name` only the module.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found & known


def import_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """What every module imports, by name; `modules` are sources by name."""
    return {name: imports(source, modules) - {name} for name, source in modules.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in order; [] if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    for name in sorted(graph):
        if found := visit(name, []):
            return found
    return []
