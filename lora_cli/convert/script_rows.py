"""What a TRL or unsloth script does with its rows between loading them and the trainer. By ast, without running it.

Each step is in the report. A function that rows are mapped by is read as far as it only renders the chat template, or
fills a prompt with columns.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

from lora_cli.convert.config import Unreadable, unused_key
from lora_cli.convert.script_source import ScriptSource, arguments_text, assignments, call_name, walk
from lora_cli.errors import LoraError

LOADS = (
    "load_dataset", "load_from_disk", "from_pandas", "from_list", "from_dict", "from_generator", "from_json",
    "from_csv", "from_parquet", "from_text",
)  # fmt: skip
METHODS = (
    "map", "filter", "select", "shuffle", "train_test_split", "rename_column", "rename_columns", "remove_columns",
    "select_columns", "take", "skip", "sort", "shard", "class_encode_column", "cast", "cast_column", "add_column",
    "add_item", "flatten", "repeat", "batch",
)  # fmt: skip
JOINS = ("concatenate_datasets", "interleave_datasets")
STANDARDIZE = ("standardize_sharegpt", "standardize_data_formats", "standardize_dataset")
MAX_PASSES = 20  # over a script, in each of which the rows get further names: two or three are usual
FIELD = re.compile(r"\{\w*\}")
# Arguments of apply_chat_template that do not change the text of a conversation.
RENDERING = ("conversation", "tokenize", "return_tensors", "padding", "truncation", "max_length", "return_dict")


class RowSteps:
    """The steps of a script, by the key of the report, and what is known of its maps."""

    def __init__(self, source: ScriptSource) -> None:
        self.source = source
        self.first: dict[str, Any] = {}  # the first of each kind, in the section `dataset`
        self.others: dict[str, Unreadable] = {}  # further ones, and those for other rows than those of training
        self.late: dict[str, Unreadable] = {}  # after training
        self.places: dict[str, str] = {}
        self.maps: dict[str, dict[str, str]] = {}  # what a function makes of rows, by the key of its step
        loads = (node for node in walk(source.tree) if isinstance(node, ast.Call) and _loads(node))
        self._first_load = next(loads, None)
        self._names = self._find_names()
        self._evaluations = self._find_evaluations()
        self._read()

    def _find_names(self) -> set[str]:
        """Return the names of rows: of what is loaded, of what is made of it, and of parameters that get it."""
        functions = self.source.functions
        loading = {name for name, function in functions.items() if any(_loads(node) for node in ast.walk(function))}
        names = set(loading)
        for _ in range(MAX_PASSES):
            before = len(names)
            for node in walk(self.source.tree):
                for target, value in assignments(node):
                    inner = list(ast.walk(value))
                    loads = any(_loads(each) or _calls(each, loading) for each in inner)
                    if loads or any(isinstance(each, ast.Name) and each.id in names for each in inner):
                        names |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
                if isinstance(node, ast.Call) and (function := functions.get(call_name(node.func))):
                    parameters = [each.arg for each in function.args.args]
                    given = [*zip(parameters, node.args, strict=False)]
                    given += [(each.arg, each.value) for each in node.keywords if each.arg in parameters]
                    names |= {name for name, each in given if isinstance(each, ast.Name) and each.id in names}
            if len(names) == before:
                return names
        raise LoraError(
            f"{self.source.file}: its rows have too many names, each of which stands for the next",
            hint="pass the part of it that trains",
        )

    def _find_evaluations(self) -> set[str]:
        found: set[str] = set()
        self._evaluations = found
        for node in walk(self.source.tree):
            for target, value in assignments(node):
                if self._is_evaluation(value):
                    found |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
        return found

    def _read(self) -> None:
        passed = [
            word.value
            for node in walk(self.source.tree)
            if isinstance(node, ast.Call)
            for word in node.keywords
            if word.arg == "eval_dataset"
        ]
        evaluated = {inner for each in passed for inner in ast.walk(each)}
        for node in walk(self.source.tree):
            if not isinstance(node, ast.Call):
                continue
            name = call_name(node.func)
            if name in STANDARDIZE:
                self.first[name] = True
            elif name in JOINS or (name in METHODS and self._is_of_rows(node.func)):
                other = name == "select" and (node in evaluated or self._is_evaluation(node.func))
                self._add(name, node, other=other)

    def _is_of_rows(self, function: ast.expr) -> bool:
        root = _root(function)
        return isinstance(root, ast.Call) or (isinstance(root, ast.Name) and root.id in self._names)

    def _is_evaluation(self, node: ast.expr) -> bool:
        """Return whether rows are of another split, or of a second load_dataset: max_rows is for those of training."""
        for each in _chain(node):
            if isinstance(each, ast.Subscript) and isinstance(each.slice, ast.Constant) and each.slice.value != "train":
                return True
        root = _root(node)
        if isinstance(root, ast.Call):
            return root is not self._first_load
        return isinstance(root, ast.Name) and root.id in self._evaluations

    def _add(self, name: str, call: ast.Call, *, other: bool) -> None:
        """Note a step; a further one of its kind stays beside the first, unless it is the same."""
        value: Any = Unreadable(arguments_text(call))
        first = call.args[0] if call.args else None
        if (
            name == "select"
            and isinstance(first, ast.Call)
            and call_name(first.func) == "range"
            and len(first.args) == 1
        ):
            value = self.source.value(first.args[0])
        if self.source.is_after_training(call):
            self.late[self._key(name, call, self.late)] = Unreadable(ast.unparse(call))
            return
        if other or self.first.get(name, value) != value:
            key = self._key(name, call, self.others)
            self.others[key] = Unreadable(ast.unparse(call))
        else:
            key = f"dataset.{name}"
            self.first[name] = value
            self.places.setdefault(key, self.source.place(call))
        if name == "map":
            self.maps.setdefault(key, self._describe(first))

    def _key(self, name: str, call: ast.Call, known: dict[str, Unreadable]) -> str:
        key = unused_key(f"{name}, line {call.lineno}", known)
        self.places[key] = self.source.place(call)
        return key

    def _describe(self, mapped: ast.expr | None) -> dict[str, str]:
        """Return what a function makes of a row: text by the chat template, by a prompt, or by other code."""
        function = self.source.functions.get(mapped.id) if isinstance(mapped, ast.Name) else None
        if function is None:
            return {"map": "code"}
        nodes = list(ast.walk(function))
        columns = list(dict.fromkeys(_columns(nodes)))
        rendered = [node for node in nodes if _calls(node, {"apply_chat_template"})]
        if rendered:
            made = any(isinstance(node, ast.Constant) and node.value == "role" for node in nodes)
            return (
                {"map": "code"}
                if made or len(columns) != 1
                else {
                    "map": "chat_template",
                    "column": columns[0],
                    "options": ", ".join(dict.fromkeys(option for node in rendered for option in _options(node))),
                }
            )
        prompts = [
            text
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(text := self.source.constants.get(node.id), str)
            if 2 <= len(FIELD.findall(text)) <= 3
        ]
        if len(prompts) == 1 and len(columns) == len(FIELD.findall(prompts[0])):
            return {"map": "prompt", "prompt": prompts[0], "columns": ",".join(columns)}
        return {"map": "code"}


def _loads(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and call_name(node.func) in LOADS


def _calls(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and call_name(node.func) in names


def _columns(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Constant):
            yield str(node.slice.value)


def _options(call: ast.AST) -> Iterator[str]:
    """Yield the arguments of apply_chat_template that change the text."""
    for word in call.keywords if isinstance(call, ast.Call) else ():
        nothing = isinstance(word.value, ast.Constant) and word.value.value in (False, None)
        if word.arg not in RENDERING and not (word.arg == "add_generation_prompt" and nothing):
            yield f"{word.arg}={ast.unparse(word.value)}"


def _chain(node: ast.expr) -> Iterator[ast.expr]:
    """Yield an expression and what its methods and subscripts are of: `a["x"].map(f)` is of `a`."""
    while True:
        yield node
        inner = getattr(node, "func", getattr(node, "value", None))
        if _loads(node) or not isinstance(inner, ast.expr):
            return
        node = inner


def _root(node: ast.expr) -> ast.expr:
    """Return the name, or the call that loads rows, at the start of an expression."""
    *_, last = _chain(node)
    return last
