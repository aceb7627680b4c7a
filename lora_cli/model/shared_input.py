"""Layers that multiply the same tensor, such as q, k and v, as one autograd step: x is read once, and kept once.

The layers of an attention module are called one by one, by code of transformers. The first call computes the outputs of
all of them, and the others take theirs. Which layers have their input in common is read from the code: a forward
function that calls them once each, unconditionally, with the same argument of its own, which it does not assign.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from lora_cli.model.fused_lora import (
    SHARED,
    FusedLora,
    FusedLora4bit,
    is_wrapped,
    layer_product,
    multiply_fused,
    runs_fused,
)


class SharedInput:
    """Layers with the same input. A class, because outputs wait in it between the calls of a forward pass."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}  # by number of the layer

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """Return y [..., out] of `layer`, whose forward pass on x [..., in] is fused."""
        number = next(number for number, each in enumerate(self._layers) if each is layer)
        if x is not self._x:
            fused = [n for n, each in enumerate(self._layers) if n == number or _may_wait(each, x)]
            outputs = multiply_fused(x, [layer_product(self._layers[n], x) for n in fused])
            self._x, self._waiting = x, dict(zip(fused, outputs, strict=True))
        elif number not in self._waiting:
            return multiply_fused(x, [layer_product(layer, x)])[0]
        y = self._waiting.pop(number)
        if not self._waiting:
            self._x = None
        return y


def _may_wait(layer: Any, x: Tensor) -> bool:
    return runs_fused(layer, x.dtype) and not is_wrapped(layer)


def share_inputs(model: nn.Module) -> int:
    """Have the LoRA layers of `model` that have their input in common run as one step; return how many such groups."""
    groups = 0
    for module in model.modules():
        for names in layers_with_one_input(type(module).forward):
            layers = [getattr(module, name, None) for name in names]
            fused = [layer for layer in layers if isinstance(layer, (FusedLora, FusedLora4bit))]
            if len(fused) > 1:
                shared = SharedInput(fused)
                for layer in fused:
                    layer.__dict__[SHARED] = shared
                groups += 1
    return groups


@cache
def layers_with_one_input(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    """Return the attributes of a module that its `forward` calls with the same argument, in the order of the calls."""
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):  # built in, or made without a file
        return ()
    function = ast.parse(source).body[0]
    if not isinstance(function, ast.FunctionDef):
        return ()
    arguments = {argument.arg for argument in function.args.args[1:]}
    every = list(ast.walk(function))
    assigned = {node.id for node in every if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    called = [name for node in every if isinstance(node, ast.Call) for name in [_layer_called(node)] if name]
    groups: dict[str, list[str]] = {}
    for statement in function.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)):
            for node in _unconditional(statement):
                name = _layer_called(node) if isinstance(node, ast.Call) else None
                if name and isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
                    (value,) = node.args
                    if isinstance(value, ast.Name) and value.id in arguments - assigned and called.count(name) == 1:
                        groups.setdefault(value.id, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _layer_called(call: ast.Call) -> str | None:
    """Return NAME of a call self.NAME(...)."""
    function = call.func
    own = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self"
    return function.attr if own and isinstance(function, ast.Attribute) else None


def _unconditional(statement: ast.AST) -> list[ast.AST]:
    """Return the nodes of a statement that are evaluated whenever it is, in the order of the text."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(statement):
        if not isinstance(node, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.GeneratorExp)):
            found += [*_unconditional(node), node]
    return found
