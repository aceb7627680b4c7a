"""Shell completion: keys of --set with their values, run folders, recipe names, formats. No torch, under half a second.

The functions return what fits behind an incomplete word; the shell adds file names where they return nothing.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_cli.recipe.suggest import JsonSchema

MAX_ENTRIES = 500  # of a folder that are looked at


def choices(*values: str) -> Callable[[str], list[str]]:
    """Return a completion of fixed values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def recipe_keys(incomplete: str) -> list[str]:
    """Return `section.key=` for the keys that fit or, once one key is left, that key with its values.

    A key whose values are open comes alone and with its default, so that the shell adds no space behind the sign.
    """
    from lora_cli.recipe.schema import Recipe
    from lora_cli.recipe.suggest import all_keys

    schema = Recipe.model_json_schema()
    leaves = {key: found for key in all_keys(schema) if (found := _leaf(key, schema)) is not None}
    key, equals, _ = incomplete.partition("=")
    fitting = [key] if equals else [name for name in leaves if name.startswith(incomplete)]
    if len(fitting) != 1 or fitting[0] not in leaves:
        return [] if equals else [f"{name}=" for name in fitting]
    values = [f"{fitting[0]}={value}" for value in _values(leaves[fitting[0]], schema)]
    return [value for value in values if value.startswith(incomplete)]


def _leaf(key: str, schema: "JsonSchema") -> "JsonSchema | None":
    """Return the schema of a key that --set can set; None for a section."""
    from lora_cli.recipe.suggest import alternatives

    section, _, name = key.rpartition(".")
    parts = alternatives(schema["properties"][section], schema) if section else [schema]
    found: JsonSchema = next(part["properties"][name] for part in parts if name in part.get("properties", {}))
    is_section = any("properties" in each for each in alternatives(found, schema))
    return None if is_section and key.count(".") == 0 else found


def _values(field: "JsonSchema", schema: "JsonSchema") -> list[str]:
    """Return the values that a key accepts: its choices, or nothing and its default."""
    from lora_cli.recipe.suggest import alternatives

    options = alternatives(field, schema)
    default = field.get("default")
    known: list[Any] = []
    for option in options:
        known += ["true", "false"] if option.get("type") == "boolean" else []
        known += option.get("enum", [option["const"]] if "const" in option else [])
    open_ended = any(each.get("type") not in ("null", "boolean") and not _is_closed(each) for each in options)
    if open_ended or not known:
        known = ["", *known, default]
    if any(option.get("type") == "null" for option in options):
        known.append(None)
    return list(dict.fromkeys(_as_yaml(value) for value in known))


def _is_closed(option: "JsonSchema") -> bool:
    return "enum" in option or "const" in option


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Return the recipes of `lora init`, with what each is for."""
    from lora_cli.commands.init import recipes

    return [
        (name, text.splitlines()[0].removeprefix("# "))
        for name, text in recipes().items()
        if name.startswith(incomplete)
    ]


def export_formats(incomplete: str) -> list[tuple[str, str]]:
    """Return the formats of `lora export`."""
    from lora_cli.export import EXPORTERS

    formats = {name: exporter.summary.partition(";")[0] for name, exporter in EXPORTERS.items()}
    return [item for item in {**formats, "list": "print all formats"}.items() if item[0].startswith(incomplete)]


def text_metrics(incomplete: str) -> list[str]:
    """Return the metrics of answers."""
    return choices("exact_match", "f1", "rouge", "bleu", "chrf", "json_valid", "numeric_match")(incomplete)


def schema_keys(incomplete: str) -> list[str]:
    """Return the sections and keys of a recipe."""
    from lora_cli.recipe.schema import Recipe
    from lora_cli.recipe.suggest import all_keys

    return [key for key in all_keys(Recipe.model_json_schema()) if key.startswith(incomplete)]


def runs_and_adapters(incomplete: str) -> list[str]:
    """Return the folders of runs and adapters that fit: here, in runs/, and in the folder of the incomplete word."""
    folder = incomplete.rpartition("/")[0]
    searched = [folder] if folder else [".", "runs"]
    found = [path for place in searched for path in _results_in(place)]
    return sorted(path for path in found if path.startswith(incomplete))


def _results_in(place: str) -> Iterator[str]:
    """Yield the runs and adapters in a folder, as the user would write them."""
    from lora_cli.run.folder import CONFIG_FILE
    from lora_cli.run.run_lock import LOCK

    try:
        with os.scandir(os.path.expanduser(place)) as entries:
            names = [entry.name for _, entry in zip(range(MAX_ENTRIES), entries, strict=False)]
    except OSError:
        return
    for name in names:
        path = Path(os.path.expanduser(place), name)
        if os.path.lexists(path / LOCK) or os.path.lexists(path / CONFIG_FILE):
            yield name if place == "." else f"{place}/{name}"


def named_adapters(incomplete: str) -> list[str]:
    """Return the folders for `--adapter [NAME=]DIR`."""
    name, equals, path = incomplete.rpartition("=")
    return [f"{name}{equals}{folder}" for folder in runs_and_adapters(path)]


def weighted_adapters(incomplete: str) -> list[str]:
    """Return the folders for `[WEIGHT*]ADAPTER`."""
    weight, star, path = incomplete.rpartition("*")
    return [f"{weight}{star}{folder}" for folder in runs_and_adapters(path)]


def complete_behind_equals_signs() -> None:
    """Let shells complete `--set adapter.method=do`, which bash splits, and `--set=adapter.method=do`."""
    from typer._click.shell_completion import ShellComplete, add_completion_class
    from typer._completion_classes import BashComplete, FishComplete, ZshComplete

    class Bash(BashComplete):
        def get_completion_args(self) -> tuple[list[str], str]:
            args, incomplete = super().get_completion_args()
            joined, self.split_off = join_words([*args, incomplete])
            return joined[:-1], joined[-1]

        def format_completion(self, item: Any) -> str:
            return super().format_completion(item).removeprefix(self.split_off)

    class WholeWords(ShellComplete):  # before the class of a shell, whose methods these call
        def get_completion_args(self) -> tuple[list[str], str]:
            args, incomplete = super().get_completion_args()  # type: ignore[safe-super]
            self.option = option_of_word(incomplete)
            return args, incomplete

        def format_completion(self, item: Any) -> str:
            item.value = self.option + item.value
            return super().format_completion(item)  # type: ignore[safe-super]

    class Zsh(WholeWords, ZshComplete):
        pass

    class Fish(WholeWords, FishComplete):
        pass

    add_completion_class(Bash, "bash")
    add_completion_class(Zsh, "zsh")
    add_completion_class(Fish, "fish")


def option_of_word(word: str) -> str:
    """Return `--set=` of `--set=adapter.rank`: zsh and fish replace whole words; empty if there is no option."""
    option, equals, _ = word.partition("=")
    return option + equals if equals and option.startswith("--") else ""


def join_words(words: list[str]) -> tuple[list[str], str]:
    """Return the words of bash joined at equals signs, and what of the last one bash has in words before it.

    Bash replaces only its own last word: `do` of `adapter.method=do`, and nothing of `adapter.method=`.
    """
    joined: list[str] = []
    for number, word in enumerate(words):
        if joined and (word == "=" or (word and words[number - 1] == "=")):
            joined[-1] += word
        else:
            joined.append(word)
    last = words[-1].removeprefix("=") if words[-1] == "=" else words[-1]
    return joined, joined[-1].removesuffix(last) if last else joined[-1]
