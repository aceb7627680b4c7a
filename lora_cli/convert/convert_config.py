"""Convert a config: the recipe that it stands for, and the lines that account for each of its keys. No torch."""

from typing import Any, NamedTuple

from lora_cli.convert.command_options import carry_command, with_names_of_config
from lora_cli.convert.config import Config
from lora_cli.convert.draft import NEEDS_ACCEPTANCE, Draft, Line, Outcome
from lora_cli.convert.interpolation import with_plain_values
from lora_cli.convert.recipe_text import recipe_text
from lora_cli.convert.tools import TOOLS
from lora_cli.recipe.rules import FORMATS_WITHOUT_CONVERSATION


class Conversion(NamedTuple):
    """The result of a conversion."""

    draft: Draft
    lines: list[Line]  # in the order of the config
    text: str  # of the recipe

    def of(self, *outcomes: Outcome) -> list[Line]:
        """Return the lines with one of the outcomes."""
        return [line for line in self.lines if line.outcome in outcomes]

    def to_accept(self) -> list[str]:
        """Return the keys that the user has to accept before the recipe is written."""
        return [line.key for line in self.of(*NEEDS_ACCEPTANCE)]


def convert_config(config: Config, tool: str) -> Conversion:
    """Return the recipe that `config` of the tool named `tool` stands for, and what became of each key.

    Raises:
        LoraError: a value cannot be read.
    """
    entry = TOOLS[tool]
    config = with_plain_values(config, tool)
    if config.kind == "command line":
        config = with_names_of_config(config, tool, entry.known)
    draft = Draft(entry.name, config)
    if config.kind == "command line" and (trainer := config.get("trainer")):
        draft.other_task("trainer", f"{trainer} is another task: `lora train` does supervised fine-tuning")
    entry.convert(draft)
    for key, value, _, reason in config.replaced:
        draft.extra(Line(key, value, Outcome.NO_EFFECT, reason=reason))
    if "model.path" not in draft.values:
        draft.put("model.path", "base-model", "replace: the config names no base")
    carry_command(draft)
    _check_warmup(draft)
    _check_evaluations(draft)
    _drop_template(draft)
    draft.finish(set(entry.known))
    return Conversion(draft, draft.in_order(), recipe_text(draft))


def _drop_template(draft: Draft) -> None:
    """Remove the chat template if no source has conversations: a recipe must not have keys without effect."""
    sources: list[dict[str, Any]] = []
    for key in ("data.train", "data.eval"):
        value = draft.values.get(key)
        sources += value if isinstance(value, list) else []
    formats = {source.get("format", draft.values.get("data.format", "auto")) for source in sources}
    formats |= {draft.values.get("data.format", "auto")} if isinstance(draft.values["data.train"], str) else set()
    if not formats <= FORMATS_WITHOUT_CONVERSATION:
        return
    reason = f"rows of format {' and '.join(sorted(formats))} have no chat template"
    for to in ("data.chat_template", "data.template_variables"):
        draft.values.pop(to, None)
        draft.assumed = [each for each in draft.assumed if each.to != to]
        for key, line in draft.lines.items():
            if line.to == to:
                draft.lines[key] = Line(key, line.value, Outcome.NO_EFFECT, reason=reason)


def _check_warmup(draft: Draft) -> None:
    """A warmup longer than the run cannot be written; its rates are those of the other tool up to the last step."""
    warmup, steps = draft.values.get("training.warmup", 0), draft.values.get("training.max_steps")
    if steps is None or warmup <= steps:
        return
    draft.put("training.warmup", steps, f"{warmup} there")
    reason = f"the run has {steps} steps, so the rate never reaches its peak; accepted: a warmup of {steps}"
    for key, line in draft.lines.items():
        if line.to == "training.warmup":
            draft.lines[key] = line._replace(outcome=Outcome.NOT_OFFERED, to="", result=None, reason=reason)
    for each in draft.assumed:
        if each.to == "training.warmup":
            draft.assumed.remove(each)
            draft.missing("warmup", f"{draft.tool}'s default has {warmup} steps, and {reason}")
            break


def _check_evaluations(draft: Draft) -> None:
    """Without rows to evaluate there is no best step, and nothing to stop by."""
    if draft.values.get("data.eval", "held out") is not None:
        return
    reason = "there are no rows to evaluate: write data.eval and this; accepted: without it"
    for to in ("training.stop_after", "training.keep"):
        if draft.values.get(to) not in (None, "last"):
            del draft.values[to]
            for key, line in draft.lines.items():
                if line.to == to:
                    draft.lines[key] = line._replace(outcome=Outcome.NOT_OFFERED, to="", result=None, reason=reason)
