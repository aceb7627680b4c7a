"""Learning rate schedules of other tools: carried where each step has the same rate. No torch.

transformers' warmup starts at 0 and this tool's one step above it; the decays are the same.
"""

from typing import Any

from lora_cli.convert.config import as_number
from lora_cli.convert.draft import Draft
from lora_cli.convert.values import positive

SCHEDULE = "training.schedule"


def carry_schedule(draft: Draft, key: str, *, default: str, kwargs: str = "lr_scheduler_kwargs") -> None:
    """Carry a schedule of transformers by its name and its keyword arguments; the learning rate is set before.

    Args:
        draft: the recipe.
        key: the key of the name.
        default: transformers' name of the schedule if the config has none.
        kwargs: the key of the keyword arguments.
    """
    written = draft.config.text(key)
    name = (written or default).rpartition(".")[2].lower()
    options = draft.config.section(kwargs)
    ours, note, used = _plain(name), "", set[str]()
    rate = draft.values.get("training.learning_rate", 0.0)
    match name:
        case "cosine_with_restarts":
            cycles = int(as_number(options.get("num_cycles", 1)) or 1)
            used = {"num_cycles"}
            if cycles > 1:
                ours = "cosine-with-restarts"
                draft.put("training.cycles", cycles, f"{kwargs}.num_cycles")
            else:
                note = "with one cycle it has no restart"
        case "cosine_with_min_lr" | "cosine_warmup_with_min_lr":
            used = {"min_lr", "min_lr_rate"}
            minimum = as_number(options.get("min_lr")) if options.get("min_lr") is not None else None
            if minimum is None:
                minimum = rate * (as_number(options.get("min_lr_rate", 0)) or 0)
            draft.put("training.min_learning_rate", rounded(minimum), f"{kwargs}")
        case "polynomial":
            used = {"lr_end", "power"}
            if as_number(options.get("power", 1)) == 1:
                end = as_number(options.get("lr_end", 1e-7)) or 0.0
                draft.put("training.min_learning_rate", end, "lr_end of transformers' polynomial schedule")
                note = "of power 1"
            else:
                ours = None
        case "warmup_stable_decay":
            used = {"num_decay_steps", "min_lr_ratio", "decay_type", "num_stable_steps", "warmup_type"}
            if options.get("num_decay_steps"):
                draft.put(
                    "training.decay", float(as_number(options["num_decay_steps"]) or 0), f"{kwargs}.num_decay_steps"
                )
            if ratio := as_number(options.get("min_lr_ratio", 0)):
                draft.put("training.min_learning_rate", rounded(rate * ratio), f"{kwargs}.min_lr_ratio")
                if positive(draft.config.number("warmup_steps")) or positive(draft.config.number("warmup_ratio")):
                    reason = "the warmup starts at this share of the rate there; accepted: it starts at 0"
                    draft.refuse(f"{kwargs}.min_lr_ratio", reason)
            if options.get("decay_type", "cosine") != "linear":
                draft.refuse(key, "its decay is a cosine; accepted: wsd with a linear decay")
            ours = "wsd"
    if draft.values.get("training.optimizer") == "schedule-free-adamw" and ours != "constant":
        draft.refuse(key, "schedule-free AdamW averages the weights in place of a decay; accepted: constant")
        ours = "constant"
    if ours is None:
        draft.refuse(key, f"there is no schedule {name}; accepted: cosine")
        ours = "cosine"
    if written:
        draft.carry(key, SCHEDULE, ours, note)
        draft.values[SCHEDULE] = ours  # also if the line says that it is not the same
    else:
        draft.assume(SCHEDULE, ours)
    _carry_options(draft, kwargs, options, used)


def _plain(name: str) -> str | None:
    plain = {
        "linear": "linear",
        "linear_with_warmup": "linear",
        "cosine": "cosine",
        "cosine_with_restarts": "cosine",
        "cosine_with_min_lr": "cosine",
        "cosine_warmup_with_min_lr": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
        "polynomial": "linear",
        "warmup_stable_decay": "wsd",
    }
    return plain.get(name)


def _carry_options(draft: Draft, kwargs: str, options: dict[str, Any], used: set[str]) -> None:
    for option in options:
        key = f"{kwargs}.{option}"
        if option in used:
            draft.carried(key, SCHEDULE, draft.values[SCHEDULE], "a part of the schedule")
        else:
            draft.refuse(key, "is not an option of this schedule here; accepted: without it")
    if not options:
        draft.same(kwargs, "asks for nothing")


def carry_warmup(draft: Draft, *, steps: str, ratio: str, schedule: str, default: float = 0.0, why: str = "") -> None:
    """Carry the warmup: steps take precedence over the fraction. transformers' plain `constant` has none.

    Args:
        draft: the recipe.
        steps: key of a number of steps; a value below 1 is a fraction, as in transformers 5.
        ratio: key of a fraction of all steps.
        schedule: transformers' name of the schedule.
        default: of the other tool, a fraction.
        why: about the default.
    """
    config = draft.config
    number = positive(config.number(steps))
    fraction = positive(config.number(ratio))
    if schedule == "constant" and (number or fraction or default):
        for key in (steps, ratio):
            draft.no_effect(key, "transformers' schedule constant has no warmup")
        draft.put("training.warmup", 0, "transformers' schedule constant has no warmup")
        return
    if number:
        draft.carry(steps, "training.warmup", number)
        draft.same(ratio, f"{steps} takes precedence" if fraction else "asks for nothing")
    elif fraction:
        draft.carry(ratio, "training.warmup", fraction)
        draft.same(steps, "asks for nothing")
    elif config.get(steps) is not None or config.get(ratio) is not None:
        draft.carry(steps if config.get(steps) is not None else ratio, "training.warmup", 0)
        draft.same(ratio, "asks for nothing")
    else:
        draft.assume("training.warmup", default or 0, why)


def rounded(rate: float) -> float:
    """Return a product of a learning rate and a ratio without the digits that floating point adds."""
    return float(f"{rate:.12g}")
