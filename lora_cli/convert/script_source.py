"""The names of a Python script: literal values, functions, what is assigned where, and what comes after training."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.convert.config import Unreadable

TRAINERS = ("SFTTrainer", "UnslothTrainer", "Trainer", "train_on_responses_only")
# Methods that change a list or a dictionary, which is then no literal.
CHANGING = ("append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "sort", "reverse")
NOT_LITERAL = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


class Assigned(NamedTuple):
    """A call whose result has a name."""

    line: int
    call: ast.Call


class ScriptSource:
    """A parsed script, and what its names stand for."""

    def __init__(self, file: Path, tree: ast.Module) -> None:
        self.file, self.tree = file, tree
        self.constants = constants(tree)
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.assigned: dict[str, list[Assigned]] = defaultdict(list)  # by name, in the order of the lines
        for node in walk(tree):
            for target, value in assignments(node):
                if isinstance(value, ast.Call):
                    for name in _names(target):
                        self.assigned[name].append(Assigned(value.lineno, value))
        self._scopes = dict(_scopes(tree, tree))
        calls = (node for node in walk(tree) if isinstance(node, ast.Call))
        self._training = next((call for call in calls if self._trains(call)), None)

    def place(self, node: ast.expr) -> str:
        """Return where a node is."""
        return f"{self.file}:{node.lineno}"

    def is_after_training(self, node: ast.expr) -> bool:
        """Return whether a node comes after the call that trains, in the same function."""
        last = self._training
        return last is not None and node.lineno > (last.end_lineno or 0) and self._scopes[node] is self._scopes[last]

    def call_of(self, node: ast.expr | None, line: int) -> ast.Call | None:
        """Return the call that a node is, or whose result the name has in a line."""
        if isinstance(node, ast.Call):
            return node
        known = self.assigned.get(node.id, []) if isinstance(node, ast.Name) else []
        return next((each.call for each in reversed(known) if each.line < line), None)

    def value(self, node: ast.expr) -> Any:
        """Return the value of a literal, or of a name that is assigned one; else the text of the expression."""
        try:
            return ast.literal_eval(node)
        except NOT_LITERAL:
            pass
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return f"torch.{node.attr}"
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item) for item in node.elts]
            if not any(isinstance(item, Unreadable) for item in items):
                return items
        if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
            pairs = zip(node.keys, node.values, strict=True)
            return {str(self.value(key)): self.value(value) for key, value in pairs if key}
        return Unreadable(ast.unparse(node))

    def _trains(self, call: ast.Call) -> bool:
        """Return whether a call is `trainer.train()`."""
        if call_name(call.func) != "train" or not isinstance(call.func, ast.Attribute):
            return call_name(call.func) == "unsloth_train"
        owner = call.func.value
        created = self.call_of(owner, call.lineno)
        return call_name(owner) == "trainer" or (created is not None and call_name(created.func) in TRAINERS)


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes in the order of the text, without those of `if False:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            continue
        yield node
        yield from walk(node)


def assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield the targets and the value of an assignment; nothing for other nodes."""
    match node:
        case ast.Assign():
            yield from ((target, node.value) for target in node.targets)
        case ast.AnnAssign(value=ast.expr()) | ast.NamedExpr():
            assert node.value is not None
            yield node.target, node.value


def call_name(function: ast.expr | None) -> str:
    """Return the last part of a dotted name; empty for other expressions."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def arguments_text(call: ast.Call) -> str:
    """Return the arguments of a call as they are written."""
    return ", ".join(ast.unparse(each) for each in (*call.args, *call.keywords)) or "()"


def _names(target: ast.expr) -> list[str]:
    targets = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    return [each.id for each in targets if isinstance(each, ast.Name)]


def _scopes(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield each node with the function or module that it is in."""
    for child in ast.iter_child_nodes(node):
        yield child, scope
        inner = (
            child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef) else scope
        )
        yield from _scopes(child, inner)


def constants(tree: ast.Module) -> dict[str, Any]:
    """Return the names of the module that are assigned once, to a literal that nothing changes."""
    counts: Counter[str] = Counter()
    changed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            counts[node.id] += 1
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.add(call_name(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            changed.add(call_name(node.func.value))
    values: dict[str, Any] = {}
    for statement in tree.body:
        for target, value in assignments(statement):
            if isinstance(target, ast.Name) and counts[target.id] == 1 and target.id not in changed:
                try:
                    values[target.id] = ast.literal_eval(value)
                except NOT_LITERAL:
                    continue
    return values
