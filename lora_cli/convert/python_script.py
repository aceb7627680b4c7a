"""Read a Python script that fine-tunes with TRL or unsloth: the arguments of its calls, by ast, without running it.

Arguments are literals, names that are assigned one literal, or else the text of their expression (`Unreadable`).
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.convert.config import Config, Unreadable
from lora_cli.errors import LoraError

# The calls that are read, by the last part of their name, and their positional arguments. Where several pass the same
# argument, the first of this list is used.
CALLS: dict[str, tuple[str, ...]] = {
    "SFTConfig": ("output_dir",),
    "UnslothTrainingArguments": ("output_dir",),
    "TrainingArguments": ("output_dir",),
    "SFTTrainer": ("model", "args"),
    "UnslothTrainer": ("model", "args"),
    "Trainer": ("model", "args"),
    "LoraConfig": ("r",),
    "get_peft_model": ("model", "peft_config"),
    "BitsAndBytesConfig": (),
    "from_pretrained": ("model_name_or_path",),
    "load_dataset": ("path", "name"),
    "get_chat_template": ("tokenizer", "chat_template"),
    "train_on_responses_only": ("trainer",),
}
# Names of arguments that stand for other keys.
RENAMED = {
    "load_dataset": {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"},
}
ONE_OF_MANY = ("from_pretrained", "get_chat_template", "TrainingArguments")  # scripts repeat these after training
OTHER_TRAINERS = (
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "PPOTrainer",
    "RewardTrainer",
    "CPOTrainer",
    "RLOOTrainer",
    "OnlineDPOTrainer",
)
# Models that are not for the next token.
OTHER_MODELS = re.compile(
    r"AutoModelFor(Sequence|Token)Classification|AutoModelFor(QuestionAnswering|Seq2SeqLM|MaskedLM|MultipleChoice)"
    r"|AutoModelForCausalLMWithValueHead"
)
CONFIGS = ("SFTConfig", "UnslothTrainingArguments", "TrainingArguments", "LoraConfig", "BitsAndBytesConfig")
# Calls that change the model or its tokenizer.
CHANGES = ("setup_chat_format", "add_special_tokens", "add_tokens", "add_new_tokens", "resize_token_embeddings")
DATASET_METHODS = (
    "map",
    "filter",
    "select",
    "shuffle",
    "train_test_split",
    "rename_column",
    "rename_columns",
    "remove_columns",
    "take",
    "skip",
    "sort",
    "shard",
    "concatenate",
    "class_encode_column",
    "cast",
)
STANDARDIZE = ("standardize_sharegpt", "standardize_data_formats", "standardize_dataset")


def read_script(file: Path, text: str) -> Config:
    """Return the arguments of the calls of a script.

    Raises:
        LoraError: it is not Python, or has none of the calls.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        place = f"{file}:{line}" if line else str(file)
        raise LoraError(
            f"{place}: is not Python that can be read", hint="notebooks: export the cells as a .py file"
        ) from None
    reader = _Reader(file, tree)
    reader.read()
    if not reader.values:
        raise LoraError(
            f"{file}: has none of the calls SFTTrainer, SFTConfig, LoraConfig, get_peft_model",
            hint="pass the script that creates the trainer",
        )
    return Config(
        file,
        reader.values,
        kind="script",
        places=reader.places,
        aliases=reader.aliases,
        program="unsloth" if _imports(tree, "unsloth") else "trl",
        facts=reader.facts,
    )


def _imports(tree: ast.Module, package: str) -> bool:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.partition(".")[0] == package for name in names):
            return True
    return False


class _Reader:
    def __init__(self, file: Path, tree: ast.Module) -> None:
        self.file, self.tree = file, tree
        self.values: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.aliases: dict[str, list[str]] = {}
        self.facts: dict[str, str] = {}
        self.constants = _constants(tree)
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.datasets: set[str] = set()
        self.evaluations: set[str] = set()  # names of rows that are not those of training
        self.first_load = next(
            (node for node in _walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "load_dataset"), None
        )
        self.assigned = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def read(self) -> None:
        found: dict[str, list[ast.Call]] = {name: [] for name in CALLS}
        for node in _walk(self.tree):
            if isinstance(node, ast.Assign):
                self._track_dataset(node)
                for target in node.targets:
                    self._read_attribute(target, node.value)
            if isinstance(node, ast.Call):
                name = _name(node.func)
                self._read_change(name, node)
                if name in found and not (name == "from_pretrained" and _is_no_model(node.func)):
                    found[name].append(node)
                elif name in OTHER_TRAINERS:
                    self.values.setdefault("trainer", name)
                    self.places["trainer"] = f"{self.file}:{node.lineno}"
        for name, calls in found.items():
            for index, call in enumerate(calls):
                if index == 0:
                    self._read_call(name, call)
                elif name not in ONE_OF_MANY:
                    self.values[f"{name}, line {call.lineno}"] = Unreadable(f"a second {name}")

    def _read_change(self, name: str, call: ast.Call) -> None:
        """Note a call that changes the model or its tokenizer, or that loads a model for another task."""
        receiver = _name(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        options = {each.arg: self._value(each.value) for each in call.keywords}
        if name == "from_pretrained" and OTHER_MODELS.fullmatch(receiver):
            self.values.setdefault("trainer", receiver)
            self.places.setdefault("trainer", f"{self.file}:{call.lineno}")
        if name == "from_pretrained" and "Peft" in receiver and options.get("is_trainable", False) is not False:
            name = "PeftModel"
        elif name not in CHANGES or (name == "add_special_tokens" and self._pads_only(call)):
            return
        text = ", ".join(ast.unparse(each) for each in (*call.args, *call.keywords))
        self.values.setdefault("calls", {})[name] = Unreadable(text or "()")
        self.places[f"calls.{name}"] = f"{self.file}:{call.lineno}"

    def _pads_only(self, call: ast.Call) -> bool:
        given = self._value(call.args[0]) if call.args else None
        return isinstance(given, dict) and set(given) == {"pad_token"}

    def _read_attribute(self, target: ast.expr, value: ast.expr) -> None:
        """Note `trainer.args.x = ...`, `config.x = ...` of a config that is read, and the tokenizer's template."""
        if not isinstance(target, ast.Attribute):
            return
        owner = target.value
        created = self.assigned.get(owner.id) if isinstance(owner, ast.Name) else None
        if _name(owner) == "args" or (created is not None and _name(created.func) in CONFIGS):
            steps = ["set", *ast.unparse(owner).split("."), target.attr]
        elif target.attr == "chat_template":
            steps = ["set", "chat_template"]
            self.aliases.setdefault("chat_template", []).append("set.chat_template")
        else:
            return
        values = self.values
        for step in steps[:-1]:
            values = values.setdefault(step, {})
        values[steps[-1]] = self._value(value)
        self.places[".".join(steps)] = f"{self.file}:{value.lineno}"

    def _read_call(self, name: str, call: ast.Call) -> None:
        arguments: dict[str, ast.expr] = {}
        for key, argument in zip(CALLS[name], call.args, strict=False):
            arguments[key] = argument
        for keyword in call.keywords:
            if keyword.arg is not None:
                arguments[keyword.arg] = keyword.value
            elif isinstance(given := self._value(keyword.value), dict):
                for key, value in given.items():
                    self._add(name, str(key), value, call.lineno)
            else:
                self._add(name, "**", Unreadable(ast.unparse(keyword.value)), keyword.value.lineno)
        for key, node in arguments.items():
            value = self._value(node)
            if key == "data_collator" and isinstance(node, ast.Name) and node.id in self.assigned:
                value = Unreadable(ast.unparse(self.assigned[node.id]))
            self._add(name, key, value, node.lineno)
        self.values.setdefault(name, {})
        self.places.setdefault(name, f"{self.file}:{call.lineno}")

    def _add(self, name: str, key: str, value: Any, line: int) -> None:
        self.values.setdefault(name, {})[key] = value
        full = f"{name}.{key}"
        self.places[full] = f"{self.file}:{line}"
        self.aliases.setdefault(RENAMED.get(name, {}).get(key, key), []).append(full)

    def _value(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.constants[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return f"torch.{node.attr}"
        if isinstance(node, ast.List | ast.Tuple):
            items = [self._value(item) for item in node.elts]
            if not any(isinstance(item, Unreadable) for item in items):
                return items
        if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
            return {
                str(self._value(key)): self._value(value)
                for key, value in zip(node.keys, node.values, strict=True)
                if key
            }
        return Unreadable(ast.unparse(node))

    def _track_dataset(self, node: ast.Assign) -> None:
        """Note what is done with the rows between load_dataset and the trainer."""
        calls = [each for each in ast.walk(node.value) if isinstance(each, ast.Call)]
        names = {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
        loads = any(_name(call.func) == "load_dataset" for call in calls)
        if not loads and not names & self.datasets:
            return
        targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.datasets |= targets
        if self._is_evaluation(node.value):
            self.evaluations |= targets
        passed = [word.value for call in calls for word in call.keywords if word.arg == "eval_dataset"]
        evaluated = {inner for each in passed for inner in ast.walk(each)}
        for call in calls:
            name = _name(call.func)
            if name == "select" and (call in evaluated or self._is_evaluation(call.func)):
                self._repeat(name, call)
            elif name in DATASET_METHODS and isinstance(call.func, ast.Attribute):
                self._add_step(name, call)
            elif name in STANDARDIZE:
                self.values.setdefault("dataset", {})[name] = True

    def _is_evaluation(self, node: ast.AST) -> bool:
        """Return whether rows are of another split, or of a second load_dataset: max_rows is for those of training."""
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value != "train":
                return True
            if isinstance(node, ast.Call) and _name(node.func) == "load_dataset":
                return node is not self.first_load
            inner = getattr(node, "func", getattr(node, "value", None))
            if not isinstance(inner, ast.AST):
                return False
            node = inner
        return node.id in self.evaluations

    def _repeat(self, name: str, call: ast.Call) -> None:
        """Note a step that the recipe cannot have beside the first one."""
        key = f"{name}, line {call.lineno}"
        self.values[key] = Unreadable(ast.unparse(call))
        self.places[key] = f"{self.file}:{call.lineno}"

    def _add_step(self, name: str, call: ast.Call) -> None:
        first = call.args[0] if call.args else None
        text = Unreadable(", ".join(ast.unparse(each) for each in (*call.args, *call.keywords)) or "()")
        value: Any = text
        if name == "select" and isinstance(first, ast.Call) and _name(first.func) == "range" and len(first.args) == 1:
            value = self._value(first.args[0])
        steps = self.values.setdefault("dataset", {})
        if name == "select" and steps.get(name, value) != value:
            self._repeat(name, call)
            return
        steps[name] = value
        self.places[f"dataset.{name}"] = f"{self.file}:{call.lineno}"
        if name == "map" and isinstance(first, ast.Name) and first.id in self.functions:
            self.facts.update(self._facts(self.functions[first.id]))

    def _facts(self, function: ast.FunctionDef) -> dict[str, str]:
        """Return what a function makes of a row: text by the chat template, by Alpaca's prompt, or by other code."""
        nodes = list(ast.walk(function))
        columns = [
            node.slice.value
            for node in nodes
            if isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ]
        if any(isinstance(node, ast.Call) and _name(node.func) == "apply_chat_template" for node in nodes):
            return {"map": "chat_template", "column": columns[0] if columns else ""}
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        prompts = [str(self.constants[name]) for name in used if isinstance(self.constants.get(name), str)]
        if any("### Instruction:" in text and "### Response:" in text for text in prompts):
            return {"map": "alpaca", "columns": ",".join(dict.fromkeys(columns))}
        return {"map": "code"}


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Return the names of the module that are assigned once, to a literal."""
    counts: Counter[str] = Counter()
    values: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            counts[node.id] += 1
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name) and counts[target.id] == 1:
                try:
                    values[target.id] = ast.literal_eval(statement.value)
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    continue
    return values


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes in the order of the text, without those of `if False:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            continue
        yield node
        yield from _walk(node)


def _is_no_model(function: ast.expr) -> bool:
    """Return whether `AutoTokenizer.from_pretrained` and the like is called."""
    receiver = _name(function.value) if isinstance(function, ast.Attribute) else ""
    return any(word in receiver for word in ("Tokenizer", "Config", "Processor", "Peft"))


def _name(function: ast.expr) -> str:
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )
