"""Readable code made hard to read without a change in what it does: no comments, no docstrings, short names."""

from __future__ import annotations

import ast
import builtins
import itertools
import keyword
import warnings
from collections.abc import Iterator

_ENTRY = "main_solution"
_KEPT = {_ENTRY, "self", "cls", "_"}
_LOOK_UP = {"eval", "exec", "globals", "locals", "vars", "__import__"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES_WITH_DOCSTRING = (ast.Module, ast.ClassDef, *_FUNCTIONS)


def degrade(code: str) -> str | None:
    """The same program with comments and docstrings stripped and its own names shortened; None if it does not parse
    or looks up names at run time.

    Only names that nothing can look up from outside are shortened: not attributes, methods and fields, nor what is
    imported, nor any name that some call passes by keyword, nor the `main_solution` that the task asks for and its
    parameters."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in the strings of the code
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return None
    if any(isinstance(node, ast.Name) and node.id in _LOOK_UP for node in ast.walk(tree)):
        return None
    _strip_docstrings(tree)
    _Shorten(tree).visit(tree)
    return ast.unparse(ast.fix_missing_locations(tree))


def _strip_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, _SCOPES_WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])


class _Shorten(ast.NodeTransformer):
    """Renames every name of `own_names`, in all scopes alike, so that what was one name stays one name."""

    def __init__(self, tree: ast.AST) -> None:
        own = own_names(tree)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | _KEPT
        fresh = (name for name in short_names() if name not in used and not hasattr(builtins, name))
        self.new = dict(zip(own, fresh, strict=False))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.new.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self.new.get(node.arg, node.arg)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.new.get(node.name, node.name)
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = self.new.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        node.name = self.new.get(node.name, node.name) if node.name else None
        return self.generic_visit(node)

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> ast.AST:
        node.names = [self.new.get(name, name) for name in node.names]
        return node

    visit_Nonlocal = visit_Global


def own_names(tree: ast.AST) -> list[str]:
    """Names that may be shortened, in order of appearance."""
    bound: dict[str, None] = {}
    reserved = set(_KEPT)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound[node.id] = None
        elif isinstance(node, ast.arg):
            bound[node.arg] = None
        elif isinstance(node, _FUNCTIONS):
            bound[node.name] = None
            if node.name == _ENTRY:
                reserved |= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound[node.name] = None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            reserved |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.keyword) and node.arg:
            reserved.add(node.arg)
        elif isinstance(node, ast.ClassDef):
            reserved |= _members(node) | {node.name}
        elif isinstance(node, ast.MatchAs | ast.MatchStar | ast.MatchMapping):
            reserved |= {name for name in (getattr(node, "name", None), getattr(node, "rest", None)) if name}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            reserved.add(node.value)  # may be a key into globals(), locals() or keyword arguments
    return [
        name for name in bound if name not in reserved and not hasattr(builtins, name) and not name.startswith("__")
    ]


def _members(node: ast.ClassDef) -> set[str]:
    """Names of methods and fields of a class: reached as attributes."""
    members = {child.name for child in node.body if isinstance(child, (*_FUNCTIONS, ast.ClassDef))}
    targets = [target for child in node.body if isinstance(child, ast.Assign) for target in child.targets]
    targets += [child.target for child in node.body if isinstance(child, ast.AnnAssign)]
    return members | {target.id for target in targets if isinstance(target, ast.Name)}


def short_names() -> Iterator[str]:
    """a, b, ... z, aa, ab, ..."""
    for length in itertools.count(1):
        for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length):
            name = "".join(letters)
            if not keyword.iskeyword(name):
                yield name
