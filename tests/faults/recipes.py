"""The part of the fault campaign with recipes: mutated YAML trees, texts and bytes, and overrides of the command line.

for case in recipe_cases(seed): outcome = try_recipe(case, folder)     # endless: take as many as wanted
"""

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_cli.recipe.dump import recipe_schema
from lora_cli.recipe.load import load_recipe
from tests.faults import mutate
from tests.faults.outcome import Outcome, run_here

CONFIGS = Path(__file__).parents[2] / "configs"


class RecipeCase(NamedTuple):
    """A recipe and overrides."""

    name: str
    content: bytes
    overrides: tuple[str, ...] = ()


def recipe_cases(seed: int) -> Iterator[RecipeCase]:
    """Yield every key with every odd value, then mutated recipes and overrides without end."""
    for key in _keys():
        for number, value in enumerate(mutate.ODD_VALUES):
            yield RecipeCase(f"{key} = odd value {number}", _yaml(_with(_full(), key, value)))
    recipes = [_full(), *(yaml.safe_load(file.read_text()) for file in sorted(CONFIGS.glob("*.yaml")))]
    texts = [file.read_text() for file in sorted(CONFIGS.glob("*.yaml"))]
    for number in itertools.count():
        rng = random.Random(f"recipe {seed} {number}")
        name = f"{seed} {number}"
        match number % 4:
            case 0 | 1:
                mutation = mutate.mutate_json(rng.choice(recipes), name)
                yield RecipeCase(f"{name}: {mutation.name}", _yaml(mutation.value))
            case 2:
                mutation = mutate.mutate_text(rng.choice(texts), name)
                yield RecipeCase(f"{name}: {mutation.name}", mutation.value.encode(errors="surrogatepass"))
                mutation = mutate.mutate_bytes(rng.choice(texts).encode(), name)
                yield RecipeCase(f"{name}: {mutation.name}", mutation.value)
            case _:
                value = mutate.dump_json(rng.choice(mutate.ODD_VALUES))
                overrides = [f"{rng.choice(_keys())}={value}" for _ in range(rng.randrange(1, 4))]
                changed = [mutate.mutate_text(text, f"{name} {text}").value for text in overrides]
                yield RecipeCase(f"{name}: overrides", _yaml(_full()), tuple(rng.choice((overrides, changed))))


def try_recipe(case: RecipeCase, folder: Path) -> Outcome:
    """Load the recipe, as every command does."""
    path = folder / "recipe.yaml"
    path.write_bytes(case.content)

    def load() -> None:
        load_recipe(path, case.overrides)

    return run_here(load)


@cache
def _keys() -> list[str]:
    """Return the dotted names of all keys of a recipe, and those of an entry of a list of sources."""
    schema = recipe_schema()

    def of(section: dict[str, Any], prefix: str) -> Iterator[str]:
        for option in section.get("anyOf", [section]):
            if "$ref" in option:
                option = schema["$defs"][option["$ref"].rpartition("/")[2]]
            for name, field in option.get("properties", {}).items():
                yield prefix + name
                yield from of(field, f"{prefix}{name}.")
            if "items" in option:
                yield from of(option["items"], f"{prefix}0.")

    return sorted(set(of(schema, "")))


def _with(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(tree))
    *parents, last = key.split(".")
    section: Any = changed
    for parent in parents:
        if isinstance(section, list):
            section = section[0]
        elif parent == "0":
            continue
        else:
            if not isinstance(section.get(parent), dict | list):
                section[parent] = [{"path": "rows.jsonl"}] if parent in ("train", "eval") else {}
            section = section[parent]
    section[last] = value
    return changed


def _full() -> dict[str, Any]:
    """Return a recipe with many keys, valid together."""
    return {
        "model": {"path": "base", "dtype": "float32", "attention": "auto", "new_tokens": ["<a>"]},
        "task": "causal-lm",
        "adapter": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": [{"path": "rows.jsonl", "weight": 2, "columns": {"prompt": "question"}}],
            "eval": 0.2,
            "max_length": 128,
            "overlong": "drop",
            "packing": False,
        },
        "training": {"max_steps": 4, "eval_every": 2, "learning_rate": 1e-2, "warmup": 0.1, "batch_size": 2},
        "output": "runs/a",
    }


def _yaml(tree: Any) -> bytes:
    # JSON is YAML, but for names of numbers; its escapes keep lone surrogates.
    text = mutate.dump_json(tree).replace("NaN", ".nan").replace("Infinity", ".inf")
    return text.encode()
