"""mlx-lm: configs of `mlx_lm.lora`, and what their keys become. No torch."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from lora_cli.convert.batches import carry_no_packing
from lora_cli.convert.config import as_list, as_number, known_values, show
from lora_cli.convert.draft import Draft
from lora_cli.convert.schedules import rounded
from lora_cli.convert.sources import NO_PATH, Source, carry_split, write_sources
from lora_cli.convert.tables import EVALUATION, HARDWARE, KeyTable, apply_table
from lora_cli.convert.torchtune import carry_betas
from lora_cli.convert.tracking import KEYS as TRACKING_KEYS
from lora_cli.convert.tracking import carry_tracking
from lora_cli.convert.values import carry_optimizer, positive
from lora_cli.errors import LoraError
from lora_cli.run.read_file import open_regular, read_json_object

MASKS = ("mask_prompt", "hf_dataset.mask_prompt")
PAIRS = "rows of prompt and completion are written in the chat template"
PAIR_COLUMNS = {"query": "prompt", "response": "completion"}
MAX_ROW = 1 << 20  # bytes
MAX_CONFIG = 8 << 20  # bytes, of a model's config.json
MAX_LAYERS = 10_000
TABLE = KeyTable(
    no_effect={
        HARDWARE: "grad_checkpoint clear_cache_threshold",
        EVALUATION: "val_batches test test_batches",
        "read by its other commands": "config prompt max_tokens temp top_p verbose",
        "settings of preference training, which is off": "beta dpo_loss_type dpo_cpo_loss_type is_reference_free delta "
        "reference_model_path reward_scaling",
    },
    same={"the loss is that of the tokens": "loss"},
    not_offered={
        "AdamW's epsilon is 1e-8; accepted: 1e-8": "optimizer_config.adamw.eps=1e-8 optimizer_config.adam.eps=1e-8",
        "biases alone are not trained; accepted: the adapter": "train_bias_only",
        "the learning rate is the recipe's; accepted: that": "optimizer_config.adafactor optimizer_config.muon "
        "optimizer_config.sgd optimizer_config.lion",
    },
    handled="model train use_dora fine_tune_type training_mode train_mode optimizer optimizer_config "
    "optimizer_config.adam optimizer_config.adamw optimizer_config.adamw.bias_correction "
    "optimizer_config.adam.bias_correction optimizer_config.adamw.betas optimizer_config.adamw.weight_decay "
    "optimizer_config.adam.betas data seed num_layers lora_layers batch_size grad_accumulation_steps iters epochs "
    "learning_rate steps_per_report steps_per_eval resume_adapter_file adapter_path save_every max_seq_length "
    "mask_prompt lora_parameters lora_parameters.rank lora_parameters.alpha lora_parameters.scale "
    "lora_parameters.dropout lora_parameters.keys lr_schedule lr_schedule.name lr_schedule.warmup "
    "lr_schedule.warmup_init lr_schedule.arguments hf_dataset hf_dataset.name hf_dataset.path hf_dataset.train_split "
    "hf_dataset.valid_split hf_dataset.test_split hf_dataset.prompt_feature hf_dataset.completion_feature "
    "hf_dataset.text_feature hf_dataset.chat_feature hf_dataset.config hf_dataset.mask_prompt wandb project_name "
    "hf_dataset.config.name "
    f"{TRACKING_KEYS}",
)


def convert(draft: Draft) -> None:
    """Convert a config of mlx-lm."""
    config = draft.config
    kind = config.text("fine_tune_type") or "lora"
    if kind not in ("lora", "dora"):
        draft.other_task("fine_tune_type", f"{kind} trains weights of the base, and here only adapters are trained")
    elif kind == "dora":
        draft.carry("fine_tune_type", "adapter.method", "dora")
    draft.same("fine_tune_type", "lora is the default")
    if config.switch("use_dora"):  # before fine_tune_type had it
        draft.carry("use_dora", "adapter.method", "dora")
    draft.same("use_dora", "lora is the default")
    for key in ("training_mode", "train_mode"):
        mode = config.text(key)
        if mode not in (None, "normal", "sft"):
            draft.other_task(key, f"{mode} is another task: `lora train` does supervised fine-tuning")
        draft.same(key, "supervised fine-tuning")
    if config.has("train") and not config.switch("train"):
        draft.other_task("train", "this config does not train: `lora eval` measures")
    draft.same("train", "`lora train` trains")
    if model := config.text("model"):
        note = "MLX's own weights are not read here: write the original model" if "mlx" in model.lower() else ""
        draft.carry("model", "model.path", model, note)
    else:
        draft.missing("model", "the config names no base; accepted: a placeholder in model.path")
    _carry_adapter(draft)
    _carry_rows(draft)
    _carry_training(draft)
    carry_tracking(draft)
    apply_table(draft, TABLE)


def _carry_adapter(draft: Draft) -> None:
    config = draft.config
    rank = config.count("lora_parameters.rank", 8)
    if config.has("lora_parameters.rank"):
        draft.carry("lora_parameters.rank", "adapter.rank", rank)
    else:
        draft.assume("adapter.rank", rank)
    scale = config.number("lora_parameters.scale")
    alpha = rounded(float(20.0 if scale is None else scale) * rank)
    if scale is None:
        draft.assume("adapter.alpha", alpha, f"a scale of 20, times rank {rank}")
    else:
        draft.carry("lora_parameters.scale", "adapter.alpha", alpha, f"a scale of {show(scale)}, times rank {rank}")
    later = any(config.is_written(key) for key in ("num_layers", "use_dora", "fine_tune_type"))
    if config.is_written("lora_layers") and not later and config.number("lora_parameters.alpha") != rank:
        reason = "mlx-lm up to 0.13 multiplied the updates by alpha / rank, too; accepted: by scale, as later versions"
        draft.refuse("lora_parameters.alpha", reason)
    draft.no_effect("lora_parameters.alpha", "mlx-lm reads lora_parameters.scale")
    dropout = config.number("lora_parameters.dropout")
    if dropout is None:
        draft.assume("adapter.dropout", 0.0)
    else:
        draft.carry("lora_parameters.dropout", "adapter.dropout", float(dropout))
    keys = [str(key) for key in as_list(config.get("lora_parameters.keys"))]
    if keys:
        # mlx-lm has paths within a layer; a name here is the end of a path.
        draft.carry("lora_parameters.keys", "adapter.target_modules", keys)
    else:
        if config.get("lora_parameters.keys") is not None:
            reason = "names no layer, so mlx-lm adapts none; accepted: every linear layer"
            draft.refuse("lora_parameters.keys", reason, always=True)
        draft.assume("adapter.target_modules", "all-linear", "every linear layer, in recent versions")
    _carry_layers(draft)
    if adapter := config.text("resume_adapter_file"):
        reason = f"{adapter} has mlx-lm's format: convert it first, and write adapter.from; accepted: a new adapter"
        draft.refuse("resume_adapter_file", reason)


def _carry_layers(draft: Draft) -> None:
    config = draft.config
    key = "num_layers" if config.has("num_layers") or not config.has("lora_layers") else "lora_layers"
    count = config.whole(key)
    count = 16 if count is None else count
    if count <= 0:  # mlx-lm takes the last 0 for all
        draft.same(key, "every layer is adapted")
        return
    model = config.text("model") or ""
    total = count_layers(model)
    if total is None:
        reason = (
            f"the last {count} layers: adapter.layers lists their indices, and the number of layers of {model} is not "
            f"known here: `hf download {shlex.quote(model)} config.json`, then convert again; accepted: every layer"
        )
        if config.has(key):
            draft.refuse(key, reason)
        else:
            draft.missing(key, f"mlx-lm's default: {reason}")
    elif count >= total:
        draft.same(key, f"the base has {total} layers")
    else:
        layers = list(range(total - count, total))
        if config.has(key):
            draft.carry(key, "adapter.layers", layers, f"the last {count} of {total}")
        else:
            draft.assume("adapter.layers", layers, f"num_layers: 16, the last of {total}")


def count_layers(model: str) -> int | None:
    """Return the number of layers of a model whose config.json is in its folder or in the hub's cache; else None."""
    file = Path(model) / "config.json"
    if not os.path.isfile(file):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model, "config.json")
        except HFValidationError:
            return None
        if not isinstance(found, str):
            return None
        file = Path(found)
    try:
        values = read_json_object(file, limit=MAX_CONFIG)
    except LoraError:
        return None
    inner = values.get("text_config", values)
    if not isinstance(inner, dict):
        return None
    layers = next((inner[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in inner), None)
    return layers if type(layers) is int and 0 < layers <= MAX_LAYERS else None


def _carry_rows(draft: Draft) -> None:
    config = draft.config
    hub = config.get("hf_dataset")
    if isinstance(hub, dict) and hub:
        _write_hub(draft, [_read_hub(draft, "hf_dataset", hub)])
    elif isinstance(hub, list) and hub and all(isinstance(each, dict) for each in hub):
        _write_hub(draft, [_read_hub(draft, f"hf_dataset[{index}]", each) for index, each in enumerate(hub)])
    else:
        _carry_folder(draft)
    if masks := [key for key in MASKS if config.switch(key)]:
        for key in masks:
            draft.carry(key, "data.loss_on", "last-turn", "of a conversation, only the last answer carries loss")
    elif config.has("mask_prompt"):
        draft.carry("mask_prompt", "data.loss_on", "all")
    else:
        draft.assume("data.loss_on", "all", "mask_prompt is false")
    length = config.whole("max_seq_length")
    if length is None:
        draft.assume("data.max_length", 2048)
    else:
        draft.carry("max_seq_length", "data.max_length", length)
    draft.assume("data.overlong", "truncate", "the end of longer rows is cut")
    carry_no_packing(draft, "packing")


def _carry_folder(draft: Draft) -> None:
    """Carry `data`: a folder with train.jsonl and valid.jsonl, or the id of a dataset on the hub."""
    folder = draft.config.text("data") or "data/"
    note = "and data.eval: its validation rows"
    if folder.startswith((".", "/")) or os.path.isdir(folder) or folder.count("/") != 1 or folder.endswith("/"):
        base = folder.rstrip("/")
        paths: list[dict[str, Any]] = [{"path": f"{base}/{name}.jsonl"} for name in ("train", "valid")]
    else:
        paths = [{"path": folder}, {"path": folder, "split": "valid"}]
    columns = _columns_of(paths[0]["path"])
    if columns is None:
        note += f"; {PAIRS}, so write format: query-response for these"
    elif {"prompt", "completion"} <= columns:
        paths = [{**each, "format": "query-response", "columns": PAIR_COLUMNS} for each in paths]
        note += f"; {PAIRS}"
    train, held_out = (Source(each, "data") for each in paths)
    write_sources(draft, "data.train", [train])
    write_sources(draft, "data.eval", [held_out])
    draft.carried("data", "data.train", train.values["path"], note)


def _columns_of(path: str) -> set[str] | None:
    """Return the columns of the first row of a local file; None if it cannot be read."""
    try:
        with open_regular(Path(path)) as file:
            row = json.loads(file.readline(MAX_ROW))
    except (LoraError, ValueError, RecursionError):
        return None
    return set(row) if isinstance(row, dict) else None


def _read_hub(draft: Draft, prefix: str, hub: dict[str, Any]) -> tuple[Source, Source | None]:
    """Return the rows of training and of evaluation of a dataset of the hub."""
    hub = known_values(hub)
    path = str(hub.get("path") or hub.get("name") or "data/train.jsonl")
    if not hub.get("path") and not hub.get("name"):
        draft.missing(f"{prefix}.path", NO_PATH)
    pairs = bool(hub.get("prompt_feature") or hub.get("completion_feature"))
    features = (
        ("prompt_feature", "query"),
        ("completion_feature", "response"),
        ("text_feature", "text"),
        ("chat_feature", "messages"),
    )
    found: list[Source] = []
    for key in ("train_split", "valid_split"):
        source = Source({"path": path}, prefix)
        if hub.get(key):
            if refused := carry_split(draft, f"{prefix}.{key}", source, str(hub[key])):
                draft.refuse(f"{prefix}.{key}", refused)
            draft.carried(f"{prefix}.{key}", "split", source.values.get("split"))
        if pairs:
            source.values["format"] = "query-response"
            source.columns(query="prompt", response="completion")
        elif hub.get("text_feature") or hub.get("chat_feature"):
            source.values["format"] = "messages" if hub.get("chat_feature") else "text"
        for feature, column in features:
            if hub.get(feature):
                source.columns(**{column: str(hub[feature])})
                draft.carried(f"{prefix}.{feature}", f"columns.{column}", hub[feature], PAIRS if pairs else "")
        if isinstance(hub.get("config"), dict):  # arguments of load_dataset
            if name := hub["config"].get("name"):
                source.values["subset"] = str(name)
                draft.carried(f"{prefix}.config.name", "subset", name)
        elif hub.get("config"):
            source.values["subset"] = str(hub["config"])
            draft.carried(f"{prefix}.config", "subset", hub["config"])
        found.append(source)
    for name in ("name", "path"):
        draft.carried(f"{prefix}.{name}", "path", path)
    draft.no_effect(f"{prefix}.test_split", EVALUATION)
    if not hub.get("train_split"):
        draft.missing(f"{prefix}.train_split", "mlx-lm's default is train[:80%]; accepted: all rows of train")
    return found[0], found[1] if hub.get("valid_split") else None


def _write_hub(draft: Draft, sources: list[tuple[Source, Source | None]]) -> None:
    write_sources(draft, "data.train", [train for train, _ in sources])
    if held_out := [each for _, each in sources if each is not None]:
        write_sources(draft, "data.eval", held_out)
    else:
        draft.assume("data.eval", 0.1, "the last tenth of train")
    draft.no_effect("data", "hf_dataset has the rows")


def _carry_training(draft: Draft) -> None:
    config = draft.config
    accumulation = config.count("grad_accumulation_steps", 1)
    written = config.whole("iters")
    iterations = 1000 if written is None else written
    steps = max(1, iterations // accumulation) if iterations > 0 else 0  # which a recipe cannot have
    note = f"{iterations} iterations of {accumulation} per step" if accumulation > 1 else ""
    if config.get("epochs") is not None and not config.has("iters"):
        draft.carry("epochs", "training.epochs", float(config.number("epochs") or 1))
    elif config.has("iters"):
        draft.carry("iters", "training.max_steps", steps, note)
    else:
        draft.assume("training.max_steps", steps, note)
    for key, to, default in (
        ("batch_size", "training.batch_size", 4),
        ("grad_accumulation_steps", "training.gradient_accumulation", 1),
    ):
        if config.get(key) is not None:
            draft.carry(key, to, config.whole(key))
        else:
            draft.assume(to, default)
    rate = config.number("learning_rate")
    if rate is None:
        draft.assume("training.learning_rate", 1e-5)
    else:
        draft.carry("learning_rate", "training.learning_rate", float(rate))
    _carry_optimizer(draft)
    _carry_schedule(draft, steps)
    draft.assume("training.max_grad_norm", None, "gradients are not clipped")
    seed = config.whole("seed")
    if seed is None:
        draft.assume("training.seed", 0)
    else:
        draft.carry("seed", "training.seed", seed)
    for key, to in (
        ("steps_per_report", "training.log_every"),
        ("steps_per_eval", "training.eval_every"),
        ("save_every", "training.save_every"),
    ):
        every = positive(config.number(key))
        if every:
            draft.carry(key, to, max(1, int(every) // accumulation))
    if folder := config.text("adapter_path"):
        draft.carry("adapter_path", "output", folder)


def _carry_optimizer(draft: Draft) -> None:
    config = draft.config
    name = (config.text("optimizer") or "adam").lower()
    section = f"optimizer_config.{name}"
    carry_optimizer(draft, "optimizer", default="adamw")
    correction = "mlx's corrects the bias of its moments only with bias_correction: true"
    corrects = config.switch(f"{section}.bias_correction")
    draft.carried(f"{section}.bias_correction", "training.optimizer", "adamw", "" if corrects else correction)
    if name in ("adam", "adamw") and "optimizer" in draft.lines and not corrects:
        line = draft.lines["optimizer"]
        draft.lines["optimizer"] = line._replace(reason=correction)
    decay = config.number(f"{section}.weight_decay")
    if name == "adamw":
        if decay is None:
            draft.assume("training.weight_decay", 0.01, "of mlx's AdamW")
        else:
            draft.carry(f"{section}.weight_decay", "training.weight_decay", float(decay))
    if config.get(f"{section}.betas"):
        carry_betas(draft, f"{section}.betas")


def _carry_schedule(draft: Draft, steps: int) -> None:
    config = draft.config
    options = config.get("lr_schedule")
    if not isinstance(options, dict) or not options:
        draft.assume("training.schedule", "constant")
        draft.assume("training.warmup", 0)
        return
    name = str(options.get("name"))
    values = [as_number(each) for each in as_list(options.get("arguments"))]
    warmup = int(as_number(options.get("warmup", 0)) or 0)
    draft.put("training.warmup", warmup, "lr_schedule.warmup")
    draft.carried("lr_schedule.warmup", "training.warmup", warmup)
    start = as_number(options.get("warmup_init", 0))
    if start:
        draft.refuse("lr_schedule.warmup_init", "the warmup starts at 0; accepted: so")
    draft.same("lr_schedule.warmup_init", "asks for nothing")
    ours = {"cosine_decay": "cosine", "linear_schedule": "linear"}.get(name)
    if ours is None or not values or values[0] is None:
        draft.refuse("lr_schedule.name", f"there is no schedule {show(name)} here; accepted: constant")
        draft.put("training.schedule", "constant", "lr_schedule")
        draft.refuse("lr_schedule.arguments", "arguments of the schedule; accepted: without them")
        return
    end_index, length_index = (2, 1) if name == "cosine_decay" else (1, 2)
    length = int(values[length_index] or steps) if len(values) > length_index else steps
    end = values[end_index] if len(values) > end_index else 0.0
    draft.put("training.learning_rate", float(values[0]), "lr_schedule.arguments")
    draft.lines.pop("learning_rate", None)
    draft.no_effect("learning_rate", "lr_schedule.arguments has it")
    draft.put("training.schedule", ours, "lr_schedule.name")
    draft.carried("lr_schedule.name", "training.schedule", ours)
    if end:
        draft.put("training.min_learning_rate", float(end), "lr_schedule.arguments")
    if abs(length + warmup - steps) > 1:
        reason = (
            f"the decay takes {length} steps after {warmup} of warmup, and the run has {steps}; "
            "accepted: it ends at the last step"
        )
        draft.refuse("lr_schedule.arguments", reason)
    draft.carried("lr_schedule.arguments", "training.learning_rate", values[0])
