"""Single keys and values of other tools: what each becomes in the recipe."""

from pathlib import Path
from typing import Any

import pytest

from lora_cli.convert.config import Config
from lora_cli.convert.convert_config import Conversion, convert_config
from lora_cli.convert.draft import Outcome
from lora_cli.convert.read import read_config
from lora_cli.recipe.load import parse_recipe
from tests.convert.minimal import MINIMAL, convert


def conversion(tool: str, **changes: Any) -> Conversion:
    return convert_config(Config(Path("x.yaml"), {**MINIMAL[tool], **changes}), tool)


def refused(tool: str, **changes: Any) -> list[str]:
    return conversion(tool, **changes).to_accept()


def source(**entry: Any) -> dict[str, Any]:
    """The source that an axolotl dataset becomes."""
    values = {**MINIMAL["axolotl"], "datasets": [{"path": "rows.jsonl", **entry}]}
    result = convert_config(Config(Path("x.yaml"), values), "axolotl")
    assert result.to_accept() == []
    data = parse_recipe(result.text, Path("r.yaml")).data
    if isinstance(data.train, str):
        return {"path": data.train, "format": data.format}
    return data.train[0].model_dump(exclude_defaults=True)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"type": "chat_template"}, {"path": "rows.jsonl", "format": "messages"}),
        ({"type": "alpaca"}, {"path": "rows.jsonl", "format": "alpaca"}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
        ({"type": "input_output"}, {"format": "segments"}),
        ({"type": "sharegpt", "conversation": "chatml"}, {"format": "sharegpt"}),
        (
            {"type": "alpaca_w_system.load_open_orca"},
            {"columns": {"instruction": "question", "input": None, "output": "response", "system": "system_prompt"}},
        ),
        ({"type": "chat_template", "field_messages": "talk"}, {"columns": {"messages": "talk"}}),
        (
            {"type": "chat_template", "message_property_mappings": {"role": "who", "content": "says"}},
            {"message_fields": {"role": "who", "content": "says"}},
        ),
        ({"type": "chat_template", "message_field_role": "from"}, {"format": "messages"}),
        ({"type": "chat_template", "roles": {"user": ["human", "narrator"]}}, {"roles": {"narrator": "user"}}),
        ({"path": "a/b", "name": "sub", "split": "test", "type": "chat_template"}, {"subset": "sub", "split": "test"}),
        ({"path": "a/b", "split": "train[:50]", "type": "chat_template"}, {"split": "train", "max_rows": 50}),
        ({"path": "json", "data_files": "x.jsonl", "type": "chat_template"}, {"path": "x.jsonl"}),
        ({"path": "a/b", "data_files": ["c/d.json"], "type": "alpaca"}, {"path": "hf://datasets/a/b/c/d.json"}),
        ({"ds_type": "json", "split": "train", "type": "chat_template"}, {"path": "rows.jsonl"}),
        (
            {"type": {"field_instruction": "q", "field_output": "a", "format": "{instruction}"}},
            {"format": "alpaca", "columns": {"instruction": "q", "input": None, "output": "a", "system": None}},
        ),
    ],
)
def test_datasets_of_axolotl(entry: dict[str, Any], expected: dict[str, Any]):
    assert source(**entry).items() >= expected.items()


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"type": "pygmalion"}, "type"),
        ({"type": "chat_template", "roles_to_train": ["user", "assistant"]}, "roles_to_train"),
        ({"type": "chat_template", "train_on_eos": "last"}, "train_on_eos"),
        ({"type": "chat_template", "shards": 4}, "shards"),
        ({"type": "chat_template", "split": "train[:20%]"}, "split"),
        ({"type": "chat_template", "chat_templte": "chatml"}, "chat_templte"),
    ],
)
def test_dataset_keys_that_are_not_offered(entry: dict[str, Any], key: str):
    assert refused("axolotl", datasets=[{"path": "rows", **entry}]) == [f"datasets[0].{key}"]


def test_a_typo_in_a_dataset_is_compared_with_the_keys_of_datasets():
    result = conversion("axolotl", datasets=[{"path": "rows", "type": "chat_template", "field_mesages": "x"}])
    (line,) = result.of(Outcome.UNKNOWN)
    assert line.reason.endswith("did you mean field_messages?")


def test_documents_have_no_chat_template():
    recipe = convert("axolotl", datasets=[{"path": "d.txt", "type": "completion"}], chat_template="chatml")
    assert recipe.data.chat_template is None
    assert recipe.data.format == "text"


@pytest.mark.parametrize(
    ("template", "model", "expected"),
    [
        ("chatml", "a/b", "chatml"),
        ("llama3", "meta-llama/Meta-Llama-3-8B", "llama3"),
        ("qwen3", "Qwen/Qwen3-8B", None),
        ("tokenizer_default", "a/b", None),
        ("{% for m in messages %}{{ m }}{% endfor %}", "a/b", "{% for m in messages %}{{ m }}{% endfor %}"),
    ],
)
def test_chat_templates(template: str, model: str, expected: str | None):
    assert convert("axolotl", base_model=model, chat_template=template).data.chat_template == expected


def test_one_template_is_for_all_sources():
    first = {"path": "a.jsonl", "type": "chat_template", "chat_template": "chatml"}
    second = {"path": "b.jsonl", "type": "chat_template", "chat_template": "jinja", "chat_template_jinja": "{{ 1 }}"}
    both = conversion("axolotl", datasets=[first, second])
    assert both.to_accept() == ["datasets[1].chat_template_jinja"]
    assert parse_recipe(both.text, Path("r.yaml")).data.chat_template == "chatml"
    assert convert("axolotl", datasets=[second]).data.chat_template == "{{ 1 }}"


def test_rows_of_the_type_alpaca_are_written_without_the_chat_template():
    result = conversion("axolotl", datasets=[{"path": "r", "type": "alpaca"}], chat_template="llama3")
    assert result.to_accept() == []
    assert parse_recipe(result.text, Path("r.yaml")).data.chat_template == "alpaca"
    assert [line.key for line in result.of(Outcome.NO_EFFECT)] == ["chat_template"]
    mixed = [{"path": "r", "type": "alpaca"}, {"path": "s", "type": "chat_template"}]
    assert refused("axolotl", datasets=mixed, chat_template="llama3") == ["datasets: type alpaca"]


def test_types_of_alpaca_in_chatml():
    chatml = {"path": "r", "type": "alpaca_w_system.load_open_orca_chatml"}
    assert convert("axolotl", datasets=[chatml]).data.chat_template == "chatml"


def test_a_template_of_another_family_is_not_offered():
    assert refused("axolotl", base_model="a/b", chat_template="cohere") == ["chat_template"]
    assert refused("llama-factory", template="yuan") == ["template"]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_bnb_8bit", "adamw-8bit"),
        ("paged_adamw_32bit", "paged-adamw"),
        ("adamw_torch_8bit", "adamw-8bit"),
        ("lion_8bit", "lion-8bit"),
        ("adafactor", "adafactor"),
        ("muon", "muon"),
        ("schedule_free_adamw", "schedule-free-adamw"),
    ],
)
def test_optimizers(name: str, ours: str):
    schedule = {"lr_scheduler": "constant"} if "free" in name else {}
    assert convert("axolotl", optimizer=name, **schedule).training.optimizer == ours


@pytest.mark.parametrize(
    ("tool", "keys", "expected"),
    [
        ("axolotl", {"optimizer": "came_pytorch"}, ["optimizer"]),
        ("axolotl", {"lr_scheduler": "rex"}, ["lr_scheduler"]),
        ("axolotl", {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, []),
        ("axolotl", {"plugins": ["axolotl.integrations.liger.LigerPlugin", "mine.Plugin"]}, ["plugins"]),
        ("litgpt", {"train": {"max_seq_length": 512, "max_steps": 900, "epochs": 2}}, ["train.epochs"]),
        ("litgpt", {"train": {"max_seq_length": 512, "max_steps": 900, "min_lr": 1e-4}}, []),
        ("axolotl", {"adam_epsilon": 1e-6}, ["adam_epsilon"]),
        ("axolotl", {"adam_epsilon": 1e-8}, []),
        ("axolotl", {"val_set_size": 200}, ["val_set_size"]),
        ("axolotl", {"load_in_8bit": True, "sample_packing": True}, ["sample_packing"]),
        ("axolotl", {"peft_use_dora": True, "peft_use_rslora": True}, ["peft_use_rslora"]),
        ("axolotl", {"peft_init_lora_weights": "gaussian"}, ["peft_init_lora_weights"]),
        ("axolotl", {"shuffle_merged_datasets": False}, ["shuffle_merged_datasets"]),
        ("axolotl", {"early_stopping_patience": 3, "load_best_model_at_end": True, "val_set_size": 0.1}, []),
        ("llama-factory", {"quantization_bit": 3}, ["quantization_bit"]),
        ("llama-factory", {"mix_strategy": "concat"}, []),
        ("llama-factory", {"mix_strategy": "interleave_under"}, ["mix_strategy"]),
        ("llama-factory", {"pref_beta": 0.1, "pref_loss": "sigmoid"}, []),
        ("trl", {"truncation_mode": "keep_end"}, ["truncation_mode"]),
        ("trl", {"truncation_mode": "keep_start"}, []),
        ("trl", {"eos_token": "<|im_end|>"}, []),
        ("trl", {"eos_token": "</done>"}, ["eos_token"]),
        ("trl", {"loss_type": "dft"}, ["loss_type"]),
        (
            "trl",
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "warmup_steps": 4,
                "lr_scheduler_kwargs": {"num_decay_steps": 9, "decay_type": "linear", "min_lr_ratio": 0.1},
            },
            ["lr_scheduler_kwargs.min_lr_ratio"],
        ),
        ("torchtune", {"shuffle": False}, ["shuffle"]),
        ("mlx", {"lr_schedule": {"name": "cosine_decay", "warmup": 100, "arguments": [1e-4, 900, 1e-6]}}, []),
        ("mlx", {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 500]}}, ["lr_schedule.arguments"]),
    ],
)
def test_what_is_not_offered_depends_on_the_value(tool: str, keys: dict[str, Any], expected: list[str]):
    assert refused(tool, **keys) == expected


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        ("axolotl", {"rl": "kto"}),
        ("axolotl", {"adapter": None}),
        ("axolotl", {"reward_model": True}),
        ("llama-factory", {"stage": "rm"}),
        ("llama-factory", {"finetuning_type": "freeze"}),
        ("llama-factory", {"do_train": False, "do_predict": True}),
        ("trl", {"use_peft": False}),
        ("torchtune", {"model": {"_component_": "torchtune.models.llama3.llama3_8b"}}),
        ("torchtune", {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}),
        ("mlx", {"fine_tune_type": "full"}),
        ("mlx", {"train_mode": "orpo"}),
    ],
)
def test_other_tasks(tool: str, keys: dict[str, Any]):
    assert conversion(tool, **keys).of(Outcome.OTHER_TASK)


@pytest.mark.parametrize(
    ("tool", "keys", "method"),
    [
        ("axolotl", {"peft_use_dora": True}, "dora"),
        ("axolotl", {"loraplus_lr_ratio": 16}, "lora+"),
        ("axolotl", {"peft_init_lora_weights": "pissa_niter_4"}, "pissa"),
        ("llama-factory", {"pissa_init": True}, "pissa"),
        ("llama-factory", {"finetuning_type": "oft"}, "oft"),
        ("trl", {"use_rslora": True}, "rslora"),
        ("mlx", {"fine_tune_type": "dora"}, "dora"),
    ],
)
def test_variants_of_lora(tool: str, keys: dict[str, Any], method: str):
    assert convert(tool, **keys).adapter.method == method


def test_quantization():
    spec = convert("llama-factory", quantization_bit=4, double_quantization=False).quantization
    assert spec is not None
    assert (spec.bits, spec.type, spec.double_quant) == (4, "nf4", False)
    eight = convert("axolotl", load_in_8bit=True).quantization
    assert eight is not None
    assert eight.bits == 8
    litgpt = convert("litgpt", quantize="bnb.fp4-dq").quantization
    assert litgpt is not None
    assert (litgpt.type, litgpt.double_quant) == ("fp4", True)
    trl = convert("trl", load_in_4bit=True).quantization
    assert trl is not None
    assert trl.double_quant is False


def test_evaluations():
    held_out = convert("llama-factory", val_size=0.1, eval_strategy="steps", eval_steps=50)
    assert (held_out.data.eval, held_out.training.eval_every) == (0.1, 50)
    off = convert("llama-factory", eval_strategy="no", save_strategy="no")
    assert (off.data.eval, off.training.eval_every, off.training.save_every) == (None, None, None)
    epochs = conversion("llama-factory", val_size=0.1, eval_strategy="epoch")
    assert "write those of an epoch" in next(line.reason for line in epochs.lines if line.key == "eval_strategy")
    steps = {"val_set_size": 0.1, "eval_steps": 50, "save_steps": 100}
    best = convert("axolotl", **steps, load_best_model_at_end=True, early_stopping_patience=2)
    assert (best.training.keep, best.training.stop_after) == ("best", 2)
    assert refused("trl", eval_strategy="epoch", load_best_model_at_end=True) == ["eval_strategy"]


def test_a_warmup_longer_than_the_run():
    result = conversion("trl", max_steps=20, warmup_steps=50)
    assert result.to_accept() == ["warmup_steps"]
    assert parse_recipe(result.text, Path("r.yaml")).training.warmup == 20


def test_modules_of_families():
    falcon = conversion("litgpt", checkpoint_dir="checkpoints/tiiuae/falcon-7b", lora_query=True, lora_mlp=True)
    assert falcon.to_accept() == ["lora_query"]
    assert "[query_key_value, dense_h_to_4h, dense_4h_to_h]" in falcon.text
    assert convert("litgpt", lora_projection=True, lora_head=True).adapter.target_modules == [
        "q_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    ]


def test_loss_on():
    assert convert("trl").data.loss_on == "all"
    assert convert("trl", assistant_only_loss=True).data.loss_on == "assistant"
    assert convert("mlx").data.loss_on == "all"
    assert convert("mlx", mask_prompt=True).data.loss_on == "last-turn"
    assert convert("llama-factory", mask_history=True).data.loss_on == "last-turn"
    assert convert("axolotl", train_on_inputs=True).data.loss_on == "all"
    assert convert("axolotl").data.loss_on == "assistant"


def test_a_launcher_has_options_of_its_own(tmp_path: Path):
    file = tmp_path / "run.sh"
    file.write_text(
        "MODEL=a/b\naccelerate launch --num_processes 4 sft.py --model_name_or_path $MODEL --use_peft \\\n"
        "  --dataset_name=c/d --lora_target_modules q_proj k_proj\n"
    )
    result = convert_config(read_config(file), "trl")
    recipe = parse_recipe(result.text, Path("r.yaml"))
    assert recipe.distributed.processes == 4
    assert recipe.model.path == "a/b"
    assert recipe.adapter.target_modules == ["q_proj", "k_proj"]


def test_a_script_with_peft_and_bitsandbytes(tmp_path: Path):
    file = tmp_path / "train.py"
    file.write_text(
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig\n"
        "bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.half)\n"
        "tokenizer = AutoTokenizer.from_pretrained('a/b', padding_side='right')\n"
        "model = AutoModelForCausalLM.from_pretrained('a/b', quantization_config=bnb, device_map='auto')\n"
        "dataset = load_dataset('json', data_files={'train': 'rows.jsonl'}, split='train')\n"
        "options = {'learning_rate': 1e-4, 'num_train_epochs': 2}\n"
        "trainer = SFTTrainer(model=model, train_dataset=dataset, args=SFTConfig('out', **options),\n"
        "    peft_config=LoraConfig(r=32, lora_alpha=64, target_modules='all-linear', task_type='CAUSAL_LM'))\n"
    )
    config = read_config(file)
    assert config.program == "trl"
    result = convert_config(config, "trl")
    assert result.to_accept() == []
    recipe = parse_recipe(result.text, Path("r.yaml"))
    assert recipe.model.path == "a/b"
    assert recipe.data.train == "rows.jsonl"
    assert recipe.quantization is not None
    assert (recipe.quantization.type, recipe.quantization.double_quant) == ("nf4", False)
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (32, 64, 0)
    assert (recipe.training.learning_rate, recipe.training.epochs, recipe.output) == (1e-4, 2, "out")


def test_trackers_are_carried():
    values = conversion("axolotl", wandb_project="p", wandb_name="n").draft.values
    assert {key: value for key, value in values.items() if key.startswith("tracking")} == {
        "tracking.to": ["wandb"],
        "tracking.project": "p",
        "tracking.name": "n",
    }
    values = conversion("trl", report_to=["tensorboard", "wandb"], run_name="n").draft.values
    assert values["tracking.to"] == ["tensorboard", "wandb"]
    assert "tracking.to" not in conversion("trl", report_to="none").draft.values
