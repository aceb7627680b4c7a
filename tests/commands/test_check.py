"""`lora check`, `lora schema` and `lora --help`: their output, their imports and their processor time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import all_keys
from tests.commands.conftest import Lora, WriteRecipe
from tests.model.test_gguf_base import write_gguf

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))


def test_check_shows_rows_labels_targets_and_memory(recipe: WriteRecipe, lora: Lora):
    result = lora("check", recipe())
    assert result.code == 0
    assert "24 rows read = " in result.out
    assert "rows.jsonl:" in result.out
    assert "[[" in result.out
    assert "<|im_end|>]]" in result.out  # the end-of-turn token carries loss
    assert "([[ ]] carries loss)" in result.out
    assert "q_proj" in result.out
    assert "2/2 layers" in result.out
    assert "trainable parameters in total" in result.out
    assert "memory, estimated: " in result.out
    assert result.out.splitlines()[-1] == "ok: lora train would train base on these rows"
    assert not Path("runs").exists()


def test_check_counts_what_train_trains(finished_run: Path, recipe: WriteRecipe, lora: Lora):
    count = json.loads((finished_run / "manifest.json").read_text())["trainable_parameters"]
    assert f"{count:,} trainable parameters in total" in lora("check", recipe()).out


def test_check_of_a_gguf_loads_no_weights_and_encodes_for_the_run(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORA_CACHE", "cache")
    write_gguf(Path("tiny.gguf"), "Q8_0")
    path = recipe({"model.path": "tiny.gguf"})
    checked = lora("check", path)
    assert checked.code == 0, checked.err
    assert "encoding" in checked.err
    assert not list(Path("cache/gguf").rglob("*.safetensors"))
    ran = lora("eval", path)
    assert ran.code == 0, ran.err
    assert "dequantizing tiny.gguf" in ran.err
    assert "encoding" not in ran.err
    # Without the free memory of the machine, which is the last number of its line and changes all the time.
    after, before = (re.sub(r"free now: .*", "", text) for text in (lora("check", path).out, checked.out))
    assert after == before


def test_check_without_a_model(recipe: WriteRecipe, lora: Lora):
    result = lora("check", recipe({"model.path": "org/not-here"}), "--no-model")
    assert result.code == 0
    assert result.out.splitlines() == [
        "rows.jsonl: 24 rows of format messages",
        "ok: the recipe is valid; model, labels and memory were not checked",
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=[str(c.relative_to(ROOT)) for c in CONFIGS])
def test_every_recipe_of_configs_passes(config: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    result = lora("check", config, "--no-model")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1].startswith("ok: ")


def test_schema_describes_every_key_and_allows_no_other(lora: Lora):
    schema = json.loads(lora("schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(all_keys(schema)) == set(all_keys(Recipe.model_json_schema()))
    text = json.dumps(schema)
    for name in re.findall(r'"#/\$defs/(\w+)"', text):
        assert name in schema["$defs"]
    assert {section["additionalProperties"] for section in [schema, *schema["$defs"].values()]} == {False}


# --- in a separate process: imports and processor time -----------------------------------------------------------

LORA_THAT_LISTS_HEAVY_IMPORTS = """
import atexit, sys
heavy = ("torch", "transformers", "peft", "datasets", "numpy", "pyarrow", "accelerate")
atexit.register(lambda: print("imported", *sorted(set(heavy) & set(sys.modules)), file=sys.stderr))
sys.argv = ["lora", *sys.argv[1:]]
from lora_cli.cli import main
main()
"""


def cpu_seconds(*command: str) -> tuple[float, int]:
    """Run a command; return its processor time in seconds, which depends little on other processes, and exit code."""
    process = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)],
    )
    _, status, usage = os.wait4(process, 0)
    return usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def light_imports() -> float:
    """Processor time that the light libraries take to import: torch takes ten times as long on any machine."""
    script = "import typer, rich.console, pydantic, yaml"
    return min(cpu_seconds(sys.executable, "-c", script)[0] for _ in range(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "limit"),
    [
        (["--help"], 0, 3),
        (["train", "--help"], 0, 3),
        (["init"], 0, 3),
        (["methods"], 0, 3),
        (["train", "bad.yaml"], 2, 5),
        (["eval", "bad.yaml"], 2, 5),
        *[
            (command.split(), 2, 3)
            for command in (
                "merge nothing --out x",
                "eval nothing",
                "export nothing --to gguf --out x",
                "chat nothing",
                "adapter inspect nothing",
                "adapter resize nothing --rank 2 --out x",
                "adapter combine nothing nothing --out x",
            )
        ],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_light_commands_import_no_heavy_library_and_take_little_time(
    arguments: list[str], code: int, limit: float, light_imports: float, workdir: Path
):
    """`limit` is in multiples of the time of the light imports, so that it holds on slow machines, too."""
    Path("bad.yaml").write_text("base_model: x\nlora_r: 8\n")
    command = [sys.executable, "-c", LORA_THAT_LISTS_HEAVY_IMPORTS, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    assert process.stderr.splitlines()[-1] == "imported", process.stderr
    assert "Traceback" not in process.stderr
    # The minimum of several runs, because other processes slow a run down through the shared CPU caches.
    times = []
    for _ in range(20):
        seconds, exit_code = cpu_seconds(sys.executable, "-m", "lora_cli", *arguments)
        assert exit_code == code
        times.append(seconds)
        if seconds < limit * light_imports:
            break
    assert min(times) < limit * light_imports


def test_check_shows_whole_characters_of_a_byte_level_tokenizer(recipe: WriteRecipe, lora: Lora):
    row = {"messages": [{"role": "user", "content": "你好，мир?"}, {"role": "assistant", "content": "世界 👍🏽"}]}
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "id": i}) + "\n" for i in range(5)))
    result = lora("check", recipe({"data.eval": None}))
    assert result.code == 0, result.err
    assert "你好，мир?" in result.out
    assert "[[世界 👍🏽<|im_end|>]]" in result.out
    assert "\ufffd" not in result.out


def test_check_and_train_refuse_recomputation_where_the_model_has_none(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    recipe({"training.gradient_checkpointing": True})
    for command in ("check", "train"):
        result = lora(command, "recipe.yaml")
        assert result.code == 2
        assert result.last_two == [
            "error: training.gradient_checkpointing: llama models cannot recompute their layers",
            "hint: write auto or false",
        ]
