"""The errors that polyce raises on purpose, collected from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import polyce

from .tables import rows

SOURCE = Path(polyce.__file__).parent
ERRORS = ("TypeError", "ValueError", "IndexError", "RuntimeError")
NOT_FOR_CALLERS = ("testing", "demo.py", "__main__.py")


def table() -> str:
    """Return a section for each file that raises, with the file's own summary."""
    parts = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE)
        if name.parts[0] in NOT_FOR_CALLERS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = list(messages(tree))
        if found:
            summary = (ast.get_docstring(tree) or "").splitlines()[0]
            body = ((f"`{error}`", _escape(message)) for error, message in found)
            parts.append(f"## {name}\n\n{summary}\n\n{rows(('type', 'message'), body)}")
    return "\n\n".join(parts)


def messages(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Return the type and the message of every error that a file raises."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    for call in sorted(calls, key=lambda call: call.lineno):
        if isinstance(call.func, ast.Name) and call.func.id in ERRORS:
            yield call.func.id, _template(call.args[0], constants)


def _template(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """Write a message with ‹names› in place of the call's values."""
    if isinstance(node, ast.Name) and node.id in constants:
        return _template(constants[node.id], constants)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, constants) + _template(node.right, constants)
    if isinstance(node, ast.FormattedValue):
        return f"‹{_placeholder(node.value)}›"
    raise TypeError(f"line {node.lineno}: an error's message must be written where it is raised")


def _placeholder(node: ast.expr) -> str:
    """Name a value by what it is taken from, without its formatting."""
    match node:
        case ast.Name():
            return node.id.strip("_").replace("_", " ").lower()
        case ast.Attribute(attr="__name__" | "__qualname__", value=value):
            return _placeholder(value)
        case ast.Attribute():
            return f"{node.attr} of {_placeholder(node.value)}".replace("_", " ")
        case ast.Call(func=ast.Attribute(attr="join"), args=[values]):
            return _placeholder(values)
        case ast.Call(func=ast.Name(id="type"), args=[value]):
            return f"type of {_placeholder(value)}"
        case ast.Call(func=ast.Name(id="len"), args=[value]):
            return f"length of {_placeholder(value)}"
        case ast.Call(args=[value, *_]):
            return _placeholder(value)
        case ast.BinOp() | ast.UnaryOp():
            return ast.unparse(node)
    return re.sub(r"[_.]", " ", ast.unparse(node))


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]{}$])", r"\\\1", text)
