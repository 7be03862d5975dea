"""What the packages of ``trady`` may import, and a reader of source files that checks it.

Nothing is imported here: files are parsed. Imports inside functions and under ``TYPE_CHECKING`` count like any other.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "trady"
#: The public face: no package but the command line may import it.
ROOT = "trady"
ROOT_FILES = frozenset({"__init__.py", "__main__.py", "errors.py"})
LONGEST_FILE_LINES = 400

#: The table of docs/architecture.md, from the lowest package to the highest. "and below" adds all that those named
#: may import; ``errors`` is open to everybody.
MAY_IMPORT: Mapping[str, str] = {
    "errors": "–",
    "records": "errors",
    "report": "errors",
    "channels": "errors",
    "ops": "errors",
    "process": "errors",
    "model": "process",
    "optim": "errors",
    "ranking": "channels, records",
    "memory": "model, ops, process, records, report",
    "policies": "channels, ranking, records",
    "quantized": "ops, model",
    "calls": "ops, quantized",
    "trace": "calls, model, process, quantized",
    "analysis": "trace, calls, channels, ops, model, quantized",
    "interception": "analysis, trace, calls, channels, optim, ops, model, quantized",
    "simulation": "interception, memory, process and below",
    "evidence": "interception, policies, process and below",
    "planning": "simulation, evidence, policies, process, ranking and below",
    "tuner": "planning, optim and below",
    "training": "tuner and below",
    "prediction": "training and below",
    "study": "training and below",
    "search": "training and below",
    "integrations": "training and below",
    "outcome": "training and below",
    "estimates": "training and below",
    "compare": "training, integrations and below",
    "cli": "all",
}

#: Who may touch the environment, and for what.
ENVIRONMENT: Mapping[str, str] = {
    "cli": "the edge",
    "compare": "${NAME} in a matrix file, and what the worker processes that it starts shall see",
    "ops.native": "TRADY_NATIVE, and where compiled kernels are kept",
    "ranking.priors": "TRADY_PRIORS, and where a user's own rankings are kept",
}


@dataclass(frozen=True)
class Import:
    """One file imports another: dotted names without ``trady``, and where it says so."""

    file: Path
    line: int
    source: str
    target: str
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source or ROOT} imports {self.target or ROOT}"


def allowed(table: Mapping[str, str] = MAY_IMPORT) -> dict[str, frozenset[str]]:
    """Return the packages that each package may import, "and below" written out.

    Raises:
        ValueError: A package is named before its own line: it would be an arrow upwards.

    """
    found: dict[str, frozenset[str]] = {}
    for package, text in table.items():
        if text == "all":
            found[package] = frozenset({*found, ROOT})
            continue
        names = {name.strip() for name in text.removesuffix(" and below").split(",")} - {"–"}
        if later := names - set(found):
            raise ValueError(f"{package} is listed below {', '.join(sorted(later))}")
        below = names.union(*(found[name] for name in names)) if text.endswith("and below") else names
        found[package] = frozenset(below | {"errors"} if package != "errors" else below)
    return found


def imports_of(root: Path) -> Iterator[Import]:
    """Read the imports of trady's own modules, of every file under ``root``."""
    modules = {_module(path, root) for path in root.rglob("*.py")}
    for path in sorted(root.rglob("*.py")):
        tree = _parsed(path)
        top = set(map(id, _module_level(tree)))
        for node in ast.walk(tree):
            for target in _targets(node, path, root, modules):
                yield Import(path, node.lineno, _module(path, root), target, id(node) in top)  # type: ignore[attr-defined]


def upward_imports(root: Path, table: Mapping[str, str] = MAY_IMPORT) -> list[str]:
    """Describe every import that the table does not allow."""
    may = allowed(table)
    problems = []
    for item in imports_of(root):
        package, target = _top(item.source), _top(item.target)
        if item.file.parent == root and package != "errors":
            continue  # __init__ and __main__ gather what is below
        if package not in may:
            problems.append(f"{item}, and {package} is not in the table")
        elif target != package and target not in may[package]:
            problems.append(f"{item}; {package} may import: {', '.join(sorted(may[package])) or 'nothing'}")
    return problems


def import_cycles(root: Path) -> list[list[str]]:
    """Return the circles of files that import each other while they are imported."""
    graph: dict[str, set[str]] = {_module(path, root): set() for path in root.rglob("*.py")}
    for item in imports_of(root):
        if item.at_module_level and item.target in graph:
            graph[item.source].add(item.target)
    return [sorted(names) for names in _components(graph) if len(names) > 1 or names[0] in graph[names[0]]]


def environment_reads(root: Path, may: Iterable[str] = tuple(ENVIRONMENT)) -> list[str]:
    """Describe every use of the environment outside the packages (or modules) that may touch it."""
    problems = []
    for path in sorted(root.rglob("*.py")):
        module = _module(path, root)
        if any(module == name or module.startswith(f"{name}.") for name in may):
            continue
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                named = {alias.name for alias in node.names}
            else:
                named = {node.attr} if isinstance(node, ast.Attribute) else set()
            for name in sorted(named & {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}):
                problems.append(f"{path}:{node.lineno}: {module} uses os.{name}")  # type: ignore[attr-defined]
    return problems


def loose_files(root: Path) -> list[str]:
    """Return the files at the root that have no business there."""
    return sorted(path.name for path in root.glob("*.py") if path.name not in ROOT_FILES)


def packages_without_docstring(root: Path) -> list[str]:
    """Return the folders with Python files that do not say what they are."""
    folders = {path.parent for path in root.rglob("*.py")}
    return sorted(str(folder.relative_to(root.parent)) for folder in folders if not _docstring(folder / "__init__.py"))


def long_files(root: Path, limit: int = LONGEST_FILE_LINES) -> dict[str, int]:
    """Return the files of ``limit`` lines or more, with their lines."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in root.rglob("*.py")}
    return {str(path.relative_to(root.parent)): count for path, count in sorted(lines.items()) if count >= limit}


def _parsed(path: Path) -> ast.Module:
    return _parse(path.read_text(encoding="utf-8"))


@functools.cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _module(path: Path, root: Path) -> str:
    """``trady/ops/layer.py`` is ``ops.layer``, ``trady/ops/__init__.py`` is ``ops``, ``trady/__init__.py`` is empty."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _top(module: str) -> str:
    return module.partition(".")[0] or ROOT


def _targets(node: ast.AST, path: Path, root: Path, modules: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = path.relative_to(root.parent).parts[: -node.level]
            base = ".".join((*here, *filter(None, (node.module,))))
        names = [f"{base}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        if name.partition(".")[0] == PACKAGE:
            inner = name.partition(".")[2]
            while inner and inner not in modules:  # a class or function of a module
                inner = inner.rpartition(".")[0]
            yield inner


def _module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk the statements that run when the module is imported: not the bodies of functions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def _components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(stack[cut:])
            del stack[cut:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(_parsed(path)) if path.is_file() else None
