"""`lora check`, `lora schema` and `lora --help`: their output, their imports and their processor time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import all_keys
from lora_cli.setup.planned_gpus import PlannedGpus, planned_gpus
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


# --- memory of GPUs that are not here ----------------------------------------------------------------------------


def plan_lines(out: str) -> list[str]:
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("memory of each GPU"))
    return lines[start:]


def test_a_plan_for_gpus_that_are_not_here(recipe: WriteRecipe, lora: Lora):
    result = lora("check", recipe({"model.dtype": "auto"}), "--gpus", "8", "--budget", "80GB")
    assert result.code == 0, result.err
    assert "in 8 processes" in result.out
    assert "memory, estimated: " not in result.out
    plan = plan_lines(result.out)
    assert plan[0] == "memory of each GPU, estimated, for 8 GPUs with 74.5 GiB (80.0 GB) each:"
    text = "\n".join(plan)
    for part in ("weights, as stored", "adapter", "gradients", "optimizer state", "logits", "temporary tensors"):
        assert part in text
    for form in ("all activations are kept", "every 4th layer", "every 2nd layer", "inputs wait in host memory"):
        assert form in text
    assert "ddp: all activations are kept: " in text
    assert "fsdp: all activations are kept: " in text
    assert "disk, estimated: " in text
    assert not Path("runs").exists()


def test_a_plan_needs_no_weights_and_a_budget_alone_means_one_gpu(recipe: WriteRecipe, lora: Lora):
    Path("bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(f"base/{name}", f"bare/{name}")
    if Path("base/chat_template.jinja").is_file():
        shutil.copyfile("base/chat_template.jinja", "bare/chat_template.jinja")
    result = lora("check", recipe({"model.path": "bare"}), "--budget", "24GiB")
    assert result.code == 0, result.err
    plan = plan_lines(result.out)
    assert plan[0] == "memory of each GPU, estimated, for one GPU with 24.0 GiB (25.8 GB):"
    assert any(line.startswith("one GPU: all activations are kept: ") for line in plan)
    assert "fsdp" not in "".join(plan)


def test_a_plan_for_gpus_has_what_needs_one(recipe: WriteRecipe, lora: Lora):
    path = recipe({"training.optimizer": "paged-adamw-8bit", "quantization": {"bits": 4}, "model.dtype": "auto"})
    assert "pages between a CUDA GPU and the host" in lora("check", path).err
    result = lora("check", path, "--budget", "24GB")
    assert result.code == 0, result.err
    assert "scales of quantized weights" in result.out
    assert "(optimizer state, where it fits; else in host memory)" in result.out
    assert "computed in bfloat16" in result.out


def test_what_to_change_is_told_where_nothing_fits(recipe: WriteRecipe, lora: Lora):
    path = recipe({"training.gradient_checkpointing": False})
    result = lora("check", path, "--gpus", "2", "--budget", "513MiB")
    assert result.code == 0, result.err
    plan = plan_lines(result.out)
    assert [line for line in plan if line.endswith(": no form fits")] == ["ddp: no form fits", "fsdp: no form fits"]
    told = plan[plan.index("what would need less:") + 1 :]
    assert told[0].startswith("  quantization: {bits: 4}: the weights take ")
    assert told[1].startswith("  training.gradient_checkpointing: auto: ")
    assert told[2].startswith("    with that, ")


def test_a_plan_that_a_run_would_refuse_is_an_error(recipe: WriteRecipe, lora: Lora):
    path = recipe({"distributed": {"strategy": "fsdp", "cpu_offload": True}})
    result = lora("check", path, "--gpus", "1", "--budget", "24GB")
    assert result.code == 2
    assert result.last_two[0] == (
        "error: distributed.cpu_offload: the base waits in host memory only if it is sharded, and one process has "
        "nothing to shard"
    )
    assert "ok: " not in result.out


def test_a_model_that_does_not_run_without_weights_is_planned_roughly(
    recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    def forward(*_: object, **__: object) -> None:
        raise ValueError("the first token is not a number")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    result = lora("check", recipe(), "--gpus", "2", "--budget", "80GB")
    assert (
        "note: activations are a rough estimate, because LlamaForCausalLM does not run without weights: "
        "ValueError: the first token is not a number" in " ".join(result.out.split())
    )
    assert "fsdp: all activations are kept" in result.out


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        (
            ["--gpus", "8"],
            "--gpus 8: this machine has no GPU whose memory could be planned with",
            "give the memory of one GPU: --budget 80GB",
        ),
        (
            ["--gpus", "99999999999", "--budget", "80GB"],
            "--gpus 99999999999 is not an integer from 1 to 100000",
            "write --gpus N, an integer from 1 to 100000; see lora check --help",
        ),
        (["--budget", "80G"], "--budget 80G is not a size", "write a number with a unit, such as 80GB"),
        (
            ["--budget", "80"],
            "--budget: a GPU needs 512 MiB before any tensor, and this is 80 bytes",
            "write the memory of one GPU with its unit: --budget 80GB",
        ),
        (
            ["--budget", "80GB", "--no-model"],
            "--gpus and --budget plan the model's memory",
            "leave out --no-model",
        ),
    ],
)
def test_mistakes_in_a_plan(
    options: list[str], error: str, hint: str, recipe: WriteRecipe, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = lora("check", recipe(), *options)
    assert (result.code, result.last_two) == (2, [f"error: {error}", f"hint: {hint}"])


def test_gpus_alone_have_the_memory_of_those_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=48 << 30))
    assert planned_gpus(4, None) == PlannedGpus(4, 48 << 30)
    assert planned_gpus(4, 24 << 30) == PlannedGpus(4, 24 << 30)
    assert planned_gpus(None, None) is None
