"""Finds loops over sets: their order is that of hashes, which differ from process to process.

A reader of source files, as :mod:`tests.import_contract` is. It follows names inside of a function and
attributes inside of a file, where all that is assigned to them, or their annotation, is a set.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What is made of an iterable without its order showing.
ORDERLESS = frozenset({"set", "frozenset", "sorted", "any", "all", "sum", "len", "min", "max", "Counter", "WeakSet"})
_SETS = frozenset({"set", "frozenset", "Set", "AbstractSet", "WeakSet"})
_OPERATORS = (ast.Sub, ast.BitAnd, ast.BitOr, ast.BitXor)
_METHODS = frozenset({"union", "intersection", "difference", "symmetric_difference"})
_Function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Loop:
    """A loop over a set."""

    file: Path
    line: int
    over: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: the order of {self.over} is another one in each process: take dict.fromkeys"


def loops_over_sets(root: Path) -> list[Loop]:
    """Read every file below a folder."""
    return [loop for path in sorted(root.rglob("*.py")) for loop in _of_file(path, root)]


def _of_file(path: Path, root: Path) -> Iterator[Loop]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    scopes: dict[ast.AST, dict[str, list[bool]]] = {}
    for node in ast.walk(tree):
        for target, known in _assigned(node):
            scopes.setdefault(_scope_of(target, node, parents, tree), {}).setdefault(ast.unparse(target), []).append(
                known
            )

    def is_set(node: ast.AST) -> bool:
        if isinstance(node, (ast.Name, ast.Attribute)):
            found = scopes.get(_scope_of(node, node, parents, tree), {}).get(ast.unparse(node), [])
            return bool(found) and all(found)
        return _makes_set(node) or (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, _OPERATORS)
            and (is_set(node.left) or is_set(node.right))
        )

    for node in ast.walk(tree):
        for iterable in _iterated(node):
            if is_set(iterable) and not _orderless(node, parents):
                yield Loop(path.relative_to(root), iterable.lineno, ast.unparse(iterable))


def _makes_set(node: ast.AST | None) -> bool:
    if isinstance(node, (ast.Set, ast.SetComp)):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else None
    return name in _SETS or (isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS)


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, bool]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for each, value in zip(target.elts, node.value.elts, strict=False):
                    yield each, _makes_set(value)
            else:
                yield target, _makes_set(node.value)
    elif isinstance(node, ast.AnnAssign):
        yield node.target, _names_set(node.annotation)
    elif isinstance(node, ast.NamedExpr):
        yield node.target, _makes_set(node.value)
    elif isinstance(node, ast.arg) and node.annotation is not None:
        yield ast.copy_location(ast.Name(node.arg), node), _names_set(node.annotation)
    elif isinstance(node, (ast.For, ast.comprehension)):
        yield node.target, False


def _names_set(annotation: ast.expr) -> bool:
    base = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return isinstance(base, ast.Name) and base.id in _SETS


def _scope_of(name: ast.AST, node: ast.AST, parents: dict[ast.AST, ast.AST], tree: ast.Module) -> ast.AST:
    """The function that a name belongs to; attributes belong to the file."""
    if isinstance(name, ast.Attribute):
        return tree
    while node in parents and not isinstance(node, _Function):
        node = parents[node]
    return node


def _iterated(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose order a node sees."""
    if isinstance(node, (ast.For, ast.comprehension)):
        yield node.iter
    elif isinstance(node, ast.Starred) and isinstance(node.ctx, ast.Load):
        yield node.value
    elif isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        joins = isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "extend", "fromkeys")
        if joins or called in ("list", "tuple", "dict", "iter", "enumerate", "zip", "map", "filter"):
            yield from (each for each in node.args if not isinstance(each, ast.Starred))


def _orderless(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether what is made of a loop has no order: a set, a sum, a sorted list."""
    while not isinstance(node, (ast.stmt, ast.Module)):
        above = parents[node]
        if isinstance(above, (ast.Set, ast.SetComp)):
            return True
        if isinstance(above, ast.Call) and node in above.args:
            name = above.func.id if isinstance(above.func, ast.Name) else getattr(above.func, "attr", "")
            if name in ORDERLESS or name in ("update", *_METHODS):
                return True
        node = above
    return False
