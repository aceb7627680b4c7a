"""Read a Python script that fine-tunes with TRL or unsloth: the arguments of its calls, by ast, without running it.

Arguments are literals, names that are assigned one literal, or else the text of their expression (`Unreadable`).
"""

import ast
import re
from pathlib import Path
from typing import Any

from lora_cli.convert.config import Config, Unreadable, unused_key
from lora_cli.convert.script_rows import RowSteps
from lora_cli.convert.script_source import ScriptSource, arguments_text, assignments, call_name, constants, walk
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
# Arguments by which the trainer, or the adapter, gets what other calls return.
USERS = {
    **dict.fromkeys(("SFTTrainer", "UnslothTrainer", "Trainer"), ("model", "args", "peft_config")),
    "get_peft_model": ("model", "peft_config"),
}
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
PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
MAX_DEPTH = 100  # of expressions and statements in each other: scripts that train have some 20
MAX_NODES = 50_000  # of the syntax tree: a script of 5,000 lines
CONFIGS = ("SFTConfig", "UnslothTrainingArguments", "TrainingArguments", "LoraConfig", "BitsAndBytesConfig")
# Calls that change the model, its tokenizer or the training.
CHANGES = (
    "setup_chat_format", "add_special_tokens", "add_tokens", "add_new_tokens", "resize_token_embeddings",
    "add_callback", "requires_grad_",
)  # fmt: skip


def read_script(file: Path, text: str) -> Config:
    """Return the arguments of the calls of a script.

    Raises:
        LoraError: it is not Python, or has none of the calls.
    """
    try:
        tree = ast.parse(text)
    except PARSE_ERRORS as error:
        line = getattr(error, "lineno", None)
        place = f"{file}:{line}" if line else str(file)
        raise LoraError(
            f"{place}: is not Python that can be read", hint="notebooks: export the cells as a .py file"
        ) from None
    _check_size(file, tree)
    reader = _Reader(ScriptSource(file, tree))
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


def constants_of(text: str) -> dict[str, Any]:
    """Return the names of a script that are assigned once, to a literal; none of a text that is not Python."""
    try:
        tree = ast.parse(text)
    except PARSE_ERRORS:
        return {}
    return constants(tree)


def _check_size(file: Path, tree: ast.Module) -> None:
    """Raise if a script is larger, or nested deeper, than any that trains: its parts are followed through each other.

    Raises:
        LoraError: it is.
    """
    level: list[ast.AST] = [tree]
    depth = count = 0
    while level:
        count += len(level)
        depth += 1
        if depth > MAX_DEPTH or count > MAX_NODES:
            found = f"is nested more than {MAX_DEPTH}" if depth > MAX_DEPTH else f"has more than {MAX_NODES:,}"
            what = "levels deep" if depth > MAX_DEPTH else "expressions"
            raise LoraError(f"{file}: {found} {what}, and is not read", hint="pass the part of it that trains")
        level = [inner for node in level for inner in ast.iter_child_nodes(node)]


def _imports(tree: ast.Module, package: str) -> bool:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.partition(".")[0] == package for name in names):
            return True
    return False


class _Reader:
    def __init__(self, source: ScriptSource) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.aliases: dict[str, list[str]] = {}
        self.facts: dict[str, dict[str, str]] = {}
        self.models = {"model", "tokenizer", "processor"}  # names of models and tokenizers
        for name, assigned in source.assigned.items():
            if any(call_name(each.call.func) == "from_pretrained" for each in assigned):
                self.models.add(name)

    def read(self) -> None:
        found: dict[str, list[ast.Call]] = {name: [] for name in CALLS}
        tokenizers: list[ast.Call] = []
        for node in walk(self.source.tree):
            for target, value in assignments(node):
                if not self.source.is_after_training(value):
                    self._read_attribute(target, value)
            if isinstance(node, ast.Call):
                name = call_name(node.func)
                self._read_change(name, node)
                if name == "from_pretrained" and _is_no_model(node.func):
                    tokenizers += [node] * any(word in _receiver(node) for word in ("Tokenizer", "Processor"))
                elif name in found:
                    found[name].append(node)
                elif name in OTHER_TRAINERS:
                    self.values.setdefault("trainer", name)
                    self.places["trainer"] = self.source.place(node)
        used = self._used([call for name in USERS for call in found[name]])
        for name, calls in found.items():
            self._read_calls(name, calls, used)
        self._read_tokenizers(tokenizers)
        self._read_rows()

    def _used(self, users: list[ast.Call]) -> set[ast.Call]:
        """Return the calls whose results the trainers and adapters get."""
        used: set[ast.Call] = set()
        for user in users:
            names = USERS[call_name(user.func)]
            given = [*user.args[: len(names)], *(word.value for word in user.keywords if word.arg in names)]
            used |= {call for each in given if (call := self.source.call_of(each, user.lineno)) is not None}
        return used

    def _read_calls(self, name: str, calls: list[ast.Call], used: set[ast.Call]) -> None:
        """Read the call that is used, else the first; note the others."""
        before = [call for call in calls if not self.source.is_after_training(call)]
        read = next((call for call in before if call in used), next(iter(before), None))
        for call in calls:
            if call is read:
                self._read_call(name, call)
            else:
                when = "after training" if call not in before else "further"
                self._note(f"{name}, line {call.lineno}", call, when)

    def _read_tokenizers(self, calls: list[ast.Call]) -> None:
        """Read the first tokenizer under the name of its class; it is the base's own, or else it is told."""
        before = [call for call in calls if not self.source.is_after_training(call)]
        if not before:
            return
        for call in before[1:]:
            self._note(f"tokenizer, line {call.lineno}", call, "further")
        options = {word.arg: self.source.value(word.value) for word in before[0].keywords if word.arg}
        path = options.pop("pretrained_model_name_or_path", None)
        if before[0].args:
            path = self.source.value(before[0].args[0])
        self.values["AutoTokenizer"] = {"path": path, **options}
        self.places.update(
            dict.fromkeys([f"AutoTokenizer.{key}" for key in ("path", *options)], self.source.place(before[0]))
        )

    def _read_rows(self) -> None:
        rows = RowSteps(self.source)
        if rows.first:
            self.values["dataset"] = rows.first
        self.values |= rows.others
        if rows.late:
            self.values["after training"] = {**self.values.get("after training", {}), **rows.late}
        self.places |= rows.places
        self.facts = rows.maps

    def _note(self, key: str, call: ast.Call, when: str) -> None:
        """Note a call that is not the one that is read: a further one, or one after training."""
        key = unused_key(key, self.values, self.values.get("after training", {}))
        text = Unreadable(ast.unparse(call))
        if when == "further":
            self.values[key] = text
        else:
            self.values.setdefault("after training", {})[key] = text
        self.places[key] = self.source.place(call)

    def _read_change(self, name: str, call: ast.Call) -> None:
        """Note a call that changes the model, its tokenizer or training, or that loads a model for another task."""
        receiver = _receiver(call)
        options = {each.arg: self.source.value(each.value) for each in call.keywords}
        if name == "from_pretrained" and OTHER_MODELS.fullmatch(receiver):
            self.values.setdefault("trainer", receiver)
            self.places.setdefault("trainer", self.source.place(call))
        if name == "from_pretrained" and "Peft" in receiver and options.get("is_trainable", False) is not False:
            name = "PeftModel"
        elif name not in CHANGES or (name == "add_special_tokens" and self._pads_only(call)):
            return
        if self.source.is_after_training(call):
            return
        calls = self.values.setdefault("calls", {})
        name = unused_key(name, calls)
        calls[name] = Unreadable(arguments_text(call))
        self.places[f"calls.{name}"] = self.source.place(call)

    def _pads_only(self, call: ast.Call) -> bool:
        given = self.source.value(call.args[0]) if call.args else None
        return isinstance(given, dict) and set(given) == {"pad_token"}

    def _read_attribute(self, target: ast.expr, value: ast.expr) -> None:
        """Note `trainer.args.x = ...`, and attributes of configs, models and tokenizers that are set."""
        if not isinstance(target, ast.Attribute):
            return
        owner = target.value
        root = owner
        while isinstance(root, ast.Attribute):
            root = root.value
        created = self.source.call_of(owner, value.lineno)
        if target.attr == "chat_template":
            steps = ["set", "chat_template"]
            self.aliases.setdefault("chat_template", []).append("set.chat_template")
        elif (
            call_name(owner) == "args"
            or (created is not None and call_name(created.func) in CONFIGS)
            or call_name(root) in self.models
            or target.attr == "requires_grad"
        ):
            steps = ["set", *re.sub(r"[^\w.]", "", ast.unparse(owner)).split("."), target.attr]
        else:
            return
        values = self.values
        for step in steps[:-1]:
            values = values.setdefault(step, {})
        values[steps[-1]] = self.source.value(value)
        self.places[".".join(steps)] = self.source.place(value)

    def _read_call(self, name: str, call: ast.Call) -> None:
        arguments: dict[str, ast.expr] = {}
        for key, argument in zip(CALLS[name], call.args, strict=False):
            arguments[key] = argument
        for number, argument in enumerate(call.args[len(CALLS[name]) :], start=len(CALLS[name]) + 1):
            arguments[f"argument {number}"] = argument
        for keyword in call.keywords:
            if keyword.arg is not None:
                arguments[keyword.arg] = keyword.value
            elif isinstance(given := self.source.value(keyword.value), dict):
                for key, value in given.items():
                    self._add(name, str(key), value, call.lineno)
            else:
                self._add(name, "**", Unreadable(ast.unparse(keyword.value)), keyword.value.lineno)
        for key, node in arguments.items():
            value = self.source.value(node)
            if key in ("data_collator", "callbacks") and (made := self.source.call_of(node, call.lineno)) is not None:
                value = Unreadable(ast.unparse(made))
            if key == "callbacks" and isinstance(node, ast.List):
                value = self._read_callbacks(name, node)
            self._add(name, key, value, node.lineno)
        self.values.setdefault(name, {})
        self.places.setdefault(name, self.source.place(call))

    def _read_callbacks(self, name: str, node: ast.List) -> Any:
        """Read the arguments of EarlyStoppingCallback, and return the other callbacks."""
        others = []
        for item in node.elts:
            call = self.source.call_of(item, node.lineno)
            if call is None or call_name(call.func) != "EarlyStoppingCallback":
                others.append(ast.unparse(item))
                continue
            given = [*zip(("early_stopping_patience", "early_stopping_threshold"), call.args, strict=False)]
            given += [(word.arg, word.value) for word in call.keywords if word.arg]
            for key, value in {"early_stopping_patience": ast.Constant(1), **dict(given)}.items():
                self._add(name, key, self.source.value(value), item.lineno)
        return Unreadable(f"[{', '.join(others)}]") if others else []

    def _add(self, name: str, key: str, value: Any, line: int) -> None:
        self.values.setdefault(name, {})[key] = value
        full = f"{name}.{key}"
        self.places[full] = f"{self.source.file}:{line}"
        self.aliases.setdefault(RENAMED.get(name, {}).get(key, key), []).append(full)


def _is_no_model(function: ast.expr) -> bool:
    """Return whether `AutoTokenizer.from_pretrained` and the like is called."""
    receiver = call_name(function.value) if isinstance(function, ast.Attribute) else ""
    return any(word in receiver for word in ("Tokenizer", "Config", "Processor", "Peft"))


def _receiver(call: ast.Call) -> str:
    return call_name(call.func.value) if isinstance(call.func, ast.Attribute) else ""
