"""transformers' TrainingArguments, which LLaMA-Factory, TRL and unsloth share: what its keys become. No torch."""

from typing import Any, NamedTuple

from lora_cli.convert.config import Config, as_list, show
from lora_cli.convert.draft import Draft
from lora_cli.convert.schedules import carry_schedule, carry_warmup
from lora_cli.convert.tables import (
    CODE,
    EVALUATION,
    GENERATION,
    HARDWARE,
    LOGGING,
    ORDER_ONLY,
    PRECISION,
    RESUME,
    SHARDING,
    UPLOAD,
    KeyTable,
)
from lora_cli.convert.tracking import carry_tracking
from lora_cli.convert.values import carry_optimizer, carry_precision, positive


class TrainerDefaults(NamedTuple):
    """Defaults of a subclass of TrainingArguments."""

    learning_rate: float = 5e-5
    epochs: float = 3.0
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.0  # a fraction of the steps
    weight_decay: float = 0.0
    seed: int = 42
    schedule: str = "linear"
    optimizer: str = "adamw"


def whole(config: Config, key: str) -> Any:
    """Read an integer."""
    return config.whole(key)


def real(config: Config, key: str) -> Any:
    """Read a number as a float."""
    value = config.number(key)
    return None if value is None else float(value)


def text(config: Config, key: str) -> Any:
    """Read a text."""
    return config.text(key)


TRAINING_ARGUMENTS = KeyTable(
    carried={
        "weight_decay": ("training.weight_decay", real),
        "adam_beta1": ("training.adam_beta1", real),
        "adam_beta2": ("training.adam_beta2", real),
        "seed": ("training.seed", whole),
        "label_smoothing_factor": ("training.label_smoothing", real),
    },
    no_effect={
        LOGGING: "logging_dir logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node "
        "disable_tqdm include_num_input_tokens_seen include_tokens_per_second debug skip_memory_metrics "
        "logging_strategy project trackio_space_id trackio_bucket_id trackio_static_space_id enable_jit_checkpoint",
        HARDWARE: "gradient_checkpointing gradient_checkpointing_kwargs use_liger_kernel liger_kernel_config "
        "torch_compile "
        "torch_compile_backend torch_compile_mode dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor torch_empty_cache_steps "
        "auto_find_batch_size jit_mode_eval use_ipex bf16_full_eval fp16_full_eval half_precision_backend "
        "fp16_backend fp16_opt_level tpu_num_cores tpu_metrics_debug mp_parameters use_cache activation_offloading "
        "dataloader_multiprocessing_context dataloader_in_order activation_checkpointing "
        "activation_checkpointing_kwargs no_cuda use_cpu use_mps_device parallelism_config",
        SHARDING: "deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
        "one process per GPU: `distributed:` has the options": "ddp_backend ddp_timeout ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph local_rank world_size nproc_per_node",
        PRECISION: "tf32",
        UPLOAD: "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
        RESUME: "resume_from_checkpoint ignore_data_skip overwrite_output_dir restore_callback_states_from_checkpoint",
        "the run folder has checkpoints and the adapter, in safetensors": "save_safetensors save_only_model "
        "save_on_each_node",
        ORDER_ONLY: "group_by_length length_column_name",
        "the columns of the row format are read": "remove_unused_columns label_names",
        EVALUATION: "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size eval_accumulation_steps "
        "eval_delay eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only "
        "include_inputs_for_metrics include_for_metrics past_index eval_on_start",
        CODE: "do_train run_name ray_scope split_batches accelerator_config torchdynamo full_determinism",
        GENERATION: "predict_with_generate generation_max_length generation_num_beams generation_config "
        "sortish_sampler",
    },
    same={
        "training.seed sets the row order too": "data_seed",
    },
    not_offered={
        "AdamW's epsilon is 1e-8; accepted: 1e-8": "adam_epsilon=1e-8",
        "the optimizer has no further options; accepted: its defaults": "optim_args",
        "only adapters are trained; accepted: without it": "optim_target_modules",
        "every row is used; accepted: the last batch of an epoch is trained, too": "dataloader_drop_last",
        "stops after a time; accepted: all steps": "max_train_minutes",
        "rows are always shuffled; accepted: shuffled": "train_sampling_strategy=random",
        "the loss is the mean over the tokens of all devices; accepted: so": "average_tokens_across_devices=true",
    },
    handled="output_dir learning_rate max_steps num_train_epochs per_device_train_batch_size per_gpu_train_batch_size "
    "train_batch_size gradient_accumulation_steps max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    "warmup_ratio optim adafactor bf16 fp16 neftune_noise_alpha eval_strategy evaluation_strategy eval_steps do_eval "
    "do_predict save_strategy save_steps save_total_limit load_best_model_at_end early_stopping_patience "
    "early_stopping_threshold metric_for_best_model greater_is_better logging_steps report_to",
)


def carry_training(draft: Draft, defaults: TrainerDefaults, *, patience: str = "early_stopping_patience") -> None:
    """Carry the steps, the learning rate, the optimizer, evaluations and checkpoints; batches are carried elsewhere.

    Args:
        draft: the recipe.
        defaults: of the tool.
        patience: as of `carry_checkpoints`.
    """
    config = draft.config
    carry_output(draft, "output_dir")
    carry_steps(draft, epochs="num_train_epochs", max_steps="max_steps", default=defaults.epochs)
    rate = config.number("learning_rate")
    if rate is None:
        draft.assume("training.learning_rate", defaults.learning_rate)
    else:
        draft.carry("learning_rate", "training.learning_rate", float(rate))
    if config.switch("adafactor"):
        draft.carry("adafactor", "training.optimizer", "adafactor")
    else:
        draft.same("adafactor", "asks for nothing")
        carry_optimizer(draft, "optim", default=defaults.optimizer)
    carry_schedule(draft, "lr_scheduler_type", default=defaults.schedule)
    name = (config.text("lr_scheduler_type") or defaults.schedule).rpartition(".")[2].lower()
    carry_warmup(draft, steps="warmup_steps", ratio="warmup_ratio", schedule=name, default=defaults.warmup)
    for key, to, default in (
        ("weight_decay", "training.weight_decay", defaults.weight_decay),
        ("seed", "training.seed", defaults.seed),
    ):
        if config.get(key) is None:
            draft.assume(to, default)
    carry_clipping(draft, "max_grad_norm")
    carry_precision(draft)
    if config.text("train_sampling_strategy") == "group_by_length":
        draft.no_effect("train_sampling_strategy", ORDER_ONLY)
    if (alpha := positive(config.number("neftune_noise_alpha"))) is not None:
        draft.carry("neftune_noise_alpha", "training.neftune_alpha", float(alpha))
    else:
        draft.same("neftune_noise_alpha", "asks for nothing")
    carry_checkpoints(draft, patience=patience)
    carry_tracking(draft)


def carry_revision(draft: Draft, key: str) -> None:
    """Carry the revision of the base on the hub; main is the default, also of a local folder, which has none."""
    if (revision := draft.config.text(key)) is None or revision == "main":
        draft.same(key, "main is the default")
    else:
        draft.carry(key, "model.revision", revision)


def carry_output(draft: Draft, key: str) -> None:
    """Carry the output folder, unless it is the base's own folder."""
    folder = draft.config.get(key)
    if draft.config.is_written(key) and not draft.config.has(key):
        draft.no_effect(key, "is not known here: the run folder is `output`, runs/lora by default")
    elif folder is not None and str(folder).rstrip("/") == str(draft.values.get("model.path", "")).rstrip("/"):
        draft.no_effect(key, "is the folder of the base, which a run does not write to: the run folder is runs/lora")
    elif folder is not None:
        draft.carry(key, "output", str(folder))


def carry_steps(draft: Draft, *, epochs: str, max_steps: str, default: float, note: str = "") -> None:
    """Carry the length of the run: a number of steps takes precedence over epochs.

    Args:
        draft: the recipe.
        epochs, max_steps: keys of the config.
        default: epochs without both.
        note: what is otherwise with a number of steps.
    """
    config = draft.config
    steps = positive(config.whole(max_steps))
    if steps is not None:
        draft.carry(max_steps, "training.max_steps", int(steps), note)
        draft.same(epochs, f"{max_steps} takes precedence")
        return
    draft.same(max_steps, "asks for nothing")
    number_of_epochs = config.number(epochs)
    if number_of_epochs is None:
        draft.assume("training.epochs", float(default))
    else:
        draft.carry(epochs, "training.epochs", float(number_of_epochs))


def carry_clipping(draft: Draft, key: str, default: float | None = 1.0, *, null_is_off: bool = True) -> None:
    """Carry the norm that gradients are clipped to; 0 switches it off, and null unless the tool leaves it out then."""
    if not draft.config.has(key) or (draft.config.get(key) is None and not null_is_off):
        draft.assume("training.max_grad_norm", default)
    else:
        norm = positive(draft.config.number(key))
        draft.carry(key, "training.max_grad_norm", None if norm is None else float(norm))


def carry_checkpoints(draft: Draft, *, patience: str = "early_stopping_patience", best: bool | None = None) -> bool:
    """Carry when the run is evaluated and saved; what counts epochs has no counterpart, and changes no weights.

    Args:
        draft: the recipe.
        patience: key of the number of evaluations without a lower loss after which the run ends.
        best: whether the best step is kept; None: as load_best_model_at_end says.

    Returns:
        Whether evaluations decide which step is kept, or when the run ends.
    """
    config = draft.config
    limit = positive(config.number(patience))
    if best is None:
        best = config.switch("load_best_model_at_end")
        if best:
            evaluated, saved = config.get("eval_steps"), config.get("save_steps")
            other = saved is not None and saved != evaluated
            note = f"there only of the steps that are saved, every {show(saved)}" if other else ""
            draft.carry("load_best_model_at_end", "training.keep", "best", note)
        else:
            draft.same("load_best_model_at_end", "asks for nothing")
    needed = best or bool(limit)
    evaluation = "eval_strategy" if config.get("eval_strategy") is not None else "evaluation_strategy"
    if limit:
        draft.carry(patience, "training.stop_after", int(limit))
    else:
        draft.same(patience, "asks for nothing")
    _carry_metric(draft, needed=needed)
    for strategy, steps, to in (
        (evaluation, "eval_steps", "training.eval_every"),
        ("save_strategy", "save_steps", "training.save_every"),
        ("logging_strategy", "logging_steps", "training.log_every"),
    ):
        _carry_interval(draft, strategy, steps, to, needed=needed)
    kept = positive(config.number("save_total_limit"))
    if kept:
        draft.carry("save_total_limit", "training.keep_checkpoints", int(kept))
    else:
        draft.same("save_total_limit", "asks for nothing: two checkpoints are kept")
    draft.no_effect("do_eval", "data.eval turns evaluation on and off")
    draft.no_effect("do_predict", "`lora eval` generates answers")
    return needed


def _carry_metric(draft: Draft, *, needed: bool) -> None:
    """Add the lines of what the best step is: here that of the lowest evaluation loss."""
    config = draft.config
    keys = ("metric_for_best_model", "greater_is_better", "early_stopping_threshold")
    if not needed:
        for key in keys:
            draft.no_effect(key, "without load_best_model_at_end and early stopping")
        return
    reason = "the best step has the lowest evaluation loss"
    if (config.text(keys[0]) or "loss").removeprefix("eval_") == "loss":
        draft.same(keys[0], reason)
    if not config.switch(keys[1]):
        draft.same(keys[1], reason)
    if not positive(config.number(keys[2])):
        draft.same(keys[2], "any lower loss counts")
    for key in keys:
        draft.refuse(key, f"{reason}, however little it is lower; accepted: so")


def _carry_interval(draft: Draft, strategy: str, steps: str, to: str, *, needed: bool) -> None:
    """Carry a number of steps between events; with `needed`, null would switch off what depends on evaluations."""
    decides = needed and to == "training.eval_every"  # which step is kept, or when the run ends
    written = draft.config.get(strategy)
    name = "no" if written is False else str(written or "").lower().rpartition(".")[2]
    every = positive(draft.config.get(steps))
    if name == "no" and not decides and to != "training.log_every":
        draft.carry(strategy, to, None)
        draft.no_effect(steps, f"{strategy} is no")
        return
    if name in ("epoch", "best"):
        reason = f"{to} counts steps: write those of an epoch; its default is 100"
        if decides:
            draft.refuse(strategy, f"when it is evaluated decides which step is kept, and {reason}")
        draft.no_effect(strategy, reason)
    elif written is not None:
        draft.no_effect(strategy, f"{to} counts steps")
    if every is not None and every >= 1 and name not in ("epoch", "no"):
        draft.carry(steps, to, int(every))
        return
    if decides and every is not None and name != "epoch":
        draft.refuse(steps, f"a share of the steps, and {to} counts them: write it; accepted: its default, 100")
    elif decides and name == "steps":
        logged = positive(draft.config.get("logging_steps")) or 500
        if logged >= 1:
            draft.assume(to, int(logged), f"without {steps}, it is logging_steps")
    draft.no_effect(steps, f"{to} is a number of steps; its default is {1 if 'log' in to else 100}")


def carry_eval_fraction(draft: Draft, key: str) -> None:
    """Carry the fraction of the rows that is held out; 0 is none. A number of rows is not offered."""
    value = draft.config.number(key)
    if value is None or not value:
        if draft.config.get(key) is not None:
            draft.carry(key, "data.eval", None)
        else:
            draft.assume("data.eval", None, "no rows are held out")
    elif 0 < value < 1:
        draft.carry(key, "data.eval", float(value))
    else:
        draft.refuse(key, f"{show(value)} is a number of rows, and data.eval a fraction; accepted: 0.05")
        draft.put("data.eval", 0.05, key)


def texts(config: Config, key: str) -> Any:
    """Read a list of texts."""
    return [str(item) for item in as_list(config.get(key))]


def as_items(config: Config, key: str) -> Any:
    """Read a list."""
    return as_list(config.get(key))


def section(config: Config, key: str) -> Any:
    """Read a section; one without keys asks for nothing.

    Raises:
        LoraError: it is none.
    """
    return config.section(key) or None
