"""Rules between the fields of a recipe: a value that has no effect is an error, and not ignored. No torch."""

import re
import shlex
from collections.abc import Callable, Iterator
from datetime import date
from glob import has_magic
from itertools import combinations
from os.path import abspath, exists, expanduser, isdir, normpath
from pathlib import PurePath

from lora_cli.recipe.adapter_rules import check_list, check_method, check_patterns, check_target_modules
from lora_cli.recipe.message_names import MESSAGE_FIELDS, ROLE_TARGETS
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.problem import Conflict, join_words, shorten
from lora_cli.recipe.schema import DataSpec, QuantizationSpec, Recipe, SourceSpec
from lora_cli.recipe.sharding_rules import check_sharding
from lora_cli.recipe.tasks import TASK_FORMATS
from lora_cli.recipe.tracking_rules import check_tracking
from lora_cli.recipe.training_rules import (
    check_batches,
    check_evaluations,
    check_optimizer,
    check_schedule,
    check_step_size,
    check_steps,
)
from lora_cli.recipe.yaml_scalars import parse_scalar

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".bz2", ".xz", ".zst", ".zip")
FORMATS_WITHOUT_CONVERSATION = {"text", "segments", "tokens", "classification", "tagging"}


def find_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield every conflict between the values of the recipe."""
    for rule in RULES:
        yield from rule(recipe)


def _check_model(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    gguf = model.path.endswith(".gguf")
    local = gguf or model.path.startswith((".", "/")) or isdir(model.path)
    if model.revision is not None and local:
        fix = "remove it: only hub models have revisions"
        yield Conflict("model.revision", "has no effect on a local model", fix, ("model.path",))
    if model.trust_remote_code and gguf:
        yield Conflict("model.trust_remote_code", "has no effect on a .gguf file", "remove it", ("model.path",))
    if model.gguf != "auto" and not gguf:
        message = "has no effect on a model that is not a .gguf file"
        yield Conflict("model.gguf", message, "remove it", ("model.path",))
    if model.gguf == "packed" and recipe.quantization is not None:
        fix = "remove the quantization section, or write dequantized"
        yield Conflict("model.gguf", "a packed base is already quantized", fix, ("quantization",))
    for index, token in enumerate(model.new_tokens):
        if not token.strip() or token in model.new_tokens[:index]:
            message = "an empty token" if not token.strip() else f"'{shorten(token)}' is listed twice"
            yield Conflict(f"model.new_tokens[{index}]", message, "remove it")
    yield from _check_new_tokens_trainable(recipe)
    if model.revision is not None and _is_none(model.revision):
        yield Conflict("model.revision", f"'{model.revision}' is read as a branch", "write null for none")
    if model.attention.lower().replace("-", "_") in ("flash", "flash_attn", "flash_attention", "fa2"):
        message = f"'{shorten(model.attention)}' is not an attention implementation of transformers"
        yield Conflict("model.attention", message, "did you mean flash_attention_2?")


def _check_new_tokens_trainable(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts for new tokens whose embeddings would keep their initial value, the mean of all embeddings."""
    adapter = recipe.adapter
    if adapter.modules_to_save:  # may be the embeddings: only the model knows their name
        return
    fix = "list it in adapter.trainable_tokens too"
    if "trainable_tokens" not in METHOD_FACTS[adapter.method].options:
        fix = "write adapter.modules_to_save: [embed_tokens, lm_head], or method lora with trainable_tokens"
    tokens = recipe.model.new_tokens
    for index, token in enumerate(tokens):
        if token.strip() and token not in (*tokens[:index], *(adapter.trainable_tokens or ())):
            message = f"new token '{shorten(token)}' is not trainable: its embedding would stay at the mean"
            depends_on = ("adapter.trainable_tokens", "adapter.modules_to_save", "adapter.method")
            yield Conflict(f"model.new_tokens[{index}]", message, fix, depends_on)


def _check_quantization(recipe: Recipe) -> Iterator[Conflict]:
    spec = recipe.quantization
    if spec and spec.bits == 8:
        fix, depends_on = "remove it, or write bits: 4", ("quantization.bits",)
        if recipe.data.packing:
            message = "LLM.int8 chooses outlier columns over the full batch, so packed rows change each other's results"
            yield Conflict("data.packing", message, "write packing: false, or bits: 4", depends_on)
        for name in ("type", "double_quant", "storage_dtype"):
            if getattr(spec, name) is not None:
                yield Conflict(f"quantization.{name}", "has no effect with 8 bits", fix, depends_on)
        # The default is not a conflict, because every resolved recipe contains it.
        if spec.compute_dtype != QuantizationSpec.model_fields["compute_dtype"].default:
            yield Conflict("quantization.compute_dtype", "has no effect with 8 bits", fix, depends_on)


def _check_sources(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    for key, value in (("data.train", data.train), ("data.eval", data.eval)):
        if value == []:
            fix = "write a path" if key == "data.train" else "write a path, or null for none"
            yield Conflict(key, "an empty list of sources", fix)
        if isinstance(value, str) and "," in value and not exists(value):
            fix = "for several sources, write a list of {path: ...}"
            yield Conflict(key, f"'{shorten(value)}' is read as a single path", fix)
        if isinstance(value, list):
            for (_, first), (index, second) in combinations(enumerate(value), 2):
                if first.model_copy(update={"weight": second.weight}) == second:
                    fix = "remove it; to repeat its rows, raise the weight of the first"
                    yield Conflict(f"{key}[{index}]", f"'{shorten(second.path)}' is listed twice", fix)
            for index, source in enumerate(value):
                if source.delimiter is not None and (len(source.delimiter) != 1 or source.delimiter in '"\r\n'):
                    message = f"{shorten(repr(source.delimiter))} cannot separate cells"
                    fix = 'write one character in double quotes, such as ";" or "\\t"'
                    yield Conflict(f"{key}[{index}].delimiter", message, fix)


def _check_eval(recipe: Recipe) -> Iterator[Conflict]:
    data, key = recipe.data, "data.eval"
    if isinstance(data.eval, str):
        text = data.eval.lower()
        if text in ("", "no", "off", "none", "false"):
            yield Conflict(key, f"'{data.eval}' is read as a path", "write null for none")
        elif isinstance(number := parse_scalar(text.removesuffix("%")), int | float):
            fix = f"write {number / 100:g}" if text.endswith("%") else "remove the quotes"
            yield Conflict(key, f"'{shorten(data.eval)}' is read as a path", fix)
    for source in _as_sources(data.train):
        for eval_source in _as_sources(data.eval):
            # Without splits, the same hub id or glob is not a conflict: train and eval default to different splits.
            same_part = (
                source.split == eval_source.split
                if source.split and eval_source.split
                else source.path.endswith(DATA_SUFFIXES) and not has_magic(source.path)
            )
            if normpath(source.path) == normpath(eval_source.path) and same_part:
                fix = "write other rows, or a held-out fraction such as 0.05"
                yield Conflict(key, f"'{shorten(eval_source.path)}' is in data.train too", fix, ("data.train",))


def _as_sources(value: str | float | list[SourceSpec] | None) -> list[SourceSpec]:
    if isinstance(value, str):
        return [SourceSpec(path=value)] if value else []
    return value if isinstance(value, list) else []


def _check_formats(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.chat_template is not None and _is_none(data.chat_template):
        message = f"'{shorten(data.chat_template)}' is read as a template"
        yield Conflict("data.chat_template", message, "write null for the tokenizer's own")
    yield from _check_template_options(data)
    formats = {source.format or data.format for source in _as_sources(data.train)}
    if not formats or not formats <= FORMATS_WITHOUT_CONVERSATION:
        return
    message = f"has no effect on rows of format {' and '.join(sorted(formats))}"
    depends_on = ("data.format", "data.train")
    if data.chat_template is not None:
        yield Conflict("data.chat_template", message, "remove it", depends_on)
    if data.template_variables:
        yield Conflict("data.template_variables", message, "remove it", depends_on)
    if data.loss_on == "last-turn":
        yield Conflict("data.loss_on", message, "remove it: they have no turns", depends_on)
    if data.merge_turns:
        yield Conflict("data.merge_turns", message, "remove it: they have no turns", depends_on)


def _check_split(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.overlong != "split":
        if data.stride:
            message = "has no effect without overlong: split"
            yield Conflict("data.stride", message, "remove it, or write overlong: split", ("data.overlong",))
        return
    if data.stride >= data.max_length:
        message = f"{data.stride} tokens of overlap leave no room in data.max_length, {data.max_length}"
        yield Conflict("data.stride", message, "write fewer, such as an eighth of max_length", ("data.max_length",))
    sources = [*_as_sources(data.train), *_as_sources(data.eval)]
    formats = {source.format or data.format for source in sources}
    if recipe.task == "causal-lm" and formats and not formats & {"auto", "text"}:
        message = f"split is for documents (format text), not for rows of format {' and '.join(sorted(formats))}"
        yield Conflict("data.overlong", message, "write drop or truncate", ("data.format", "data.train"))


def _check_message_names(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts for names of message keys and roles that do not exist, for example in the other direction."""
    data = recipe.data
    sections: list[tuple[str, DataSpec | SourceSpec]] = [("data", data)]
    for side, sources in (("train", data.train), ("eval", data.eval)):
        if isinstance(sources, list):
            sections += [(f"data.{side}[{index}]", source) for index, source in enumerate(sources)]
    for section, spec in sections:
        for key in sorted(spec.message_fields.keys() - set(MESSAGE_FIELDS)):
            fix = f"write one of {join_words(list(MESSAGE_FIELDS))}, and after it the name in the file"
            if spec.message_fields[key] in MESSAGE_FIELDS:
                fix = f"write {{{spec.message_fields[key]}: {shorten(key)}}}: the name in the file comes second"
            yield Conflict(f"{section}.message_fields", f"'{shorten(key)}' is not a key of messages", fix)
        for name, role in spec.roles.items():
            if role not in ROLE_TARGETS:
                fix = f"write one of {join_words(list(ROLE_TARGETS))}"
                if name in ROLE_TARGETS:
                    fix = f"write {{{shorten(role)}: {name}}}: the name in the file comes first"
                yield Conflict(f"{section}.roles", f"'{shorten(role)}' is not a role", fix)


def _check_template_options(data: DataSpec) -> Iterator[Conflict]:
    by_key = {"data.template_variables": data.template_variables}
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        if isinstance(sources, list):
            by_key |= {f"{key}[{i}].template_variables": source.template_variables for i, source in enumerate(sources)}
    for key, variables in by_key.items():
        for name, value in variables.items():
            if isinstance(value, str) and value.lower() in ("true", "false"):
                # A template would read the text as true.
                fix = "remove the quotes"
                yield Conflict(key, f"{name} is the text '{value}', which a template reads as true", fix)
    if data.template_date is not None:
        try:
            date.fromisoformat(data.template_date)
        except ValueError:
            message = f"'{shorten(data.template_date)}' is not a date"
            yield Conflict("data.template_date", message, "write it as 2026-01-31")


def _check_task(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts for row formats that the task does not support, and for keys that have no effect with it."""
    task, data = recipe.task, recipe.data
    supported = TASK_FORMATS[task]
    formats = [("data.format", data.format)]
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        if isinstance(sources, list):
            formats += [(f"{key}[{i}].format", source.format or "auto") for i, source in enumerate(sources)]
    for key, name in formats:
        if name != "auto" and name not in supported:
            fix = f"write {join_words(list(supported))}, or auto"
            yield Conflict(key, f"task {task} does not support rows of format {name}", fix, ("task",))
    if data.labels != "auto" and task not in ("seq-cls", "token-cls"):
        yield Conflict("data.labels", f"has no effect with task {task}", "remove it", ("task",))
    if data.labels == "regression" and task == "token-cls":
        yield Conflict("data.labels", f"task {task} does not support regression", "list the label names", ("task",))
    if isinstance(data.labels, list):
        yield from check_list("data.labels", data.labels)
    if recipe.training.label_smoothing and data.labels == "regression":
        key = "training.label_smoothing"
        yield Conflict(key, "has no effect on regression", "remove it", ("data.labels",))
    if task == "causal-lm":
        return
    if data.packing:
        message = f"rows of task {task} cannot be packed: each is a separate sequence"
        yield Conflict("data.packing", message, "write packing: false, or remove it", ("task",))
    if data.overlong == "split":
        message = f"split is for documents (format text), not for task {task}"
        yield Conflict("data.overlong", message, "write drop or truncate", ("task",))
    unused: dict[str, object] = {
        "chat_template": data.chat_template,
        "template_variables": data.template_variables or None,
        "template_date": data.template_date,
        "loss_on": data.loss_on,
        "merge_turns": data.merge_turns,
    }
    for key, value in unused.items():
        if value not in (None, "assistant", False):
            yield Conflict(f"data.{key}", f"has no effect with task {task}", "remove it", ("task",))
    if recipe.training.neftune_alpha and task == "seq2seq-lm":
        message = f"NEFTune is defined for the embeddings of one sequence, and {task} has two"
        yield Conflict("training.neftune_alpha", message, "remove it", ("task",))
    if recipe.generation != type(recipe.generation)() and task != "seq2seq-lm":
        yield Conflict("generation", f"has no effect with task {task}", "remove it", ("task",))


def _check_generation(recipe: Recipe) -> Iterator[Conflict]:
    spec = recipe.generation
    if spec.length_penalty is not None and spec.num_beams == 1:
        fix = "remove it, or raise num_beams"
        yield Conflict("generation.length_penalty", "has no effect without beam search", fix, ("generation.num_beams",))
    if spec.temperature and spec.num_beams > 1:
        fix = "remove it, or write num_beams: 1"
        message = "beam search cannot be combined with sampling"
        yield Conflict("generation.temperature", message, fix, ("generation.num_beams",))
    if spec.top_p < 1 and not spec.temperature:
        fix = "write a temperature too, or remove it"
        yield Conflict("generation.top_p", "has no effect without sampling", fix, ("generation.temperature",))


def _check_max_loss(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.max_loss and data.overlong in ("error", "split") and data.on_bad_row == "error":
        message = "has no effect when the first lost row stops the run"
        fix = "write overlong: drop or on_bad_row: skip, or remove it"
        yield Conflict("data.max_loss", message, fix, ("data.overlong", "data.on_bad_row"))


def _check_paths(recipe: Recipe) -> Iterator[Conflict]:
    for key, path in _all_paths(recipe):
        if path.startswith("~"):
            yield Conflict(key, "`~` is not expanded", f"write the full path: {shorten(expanduser(path))}")
        elif re.search(r"\$\w|\$\{", path):
            yield Conflict(
                key, "variables are not expanded", f"write the full path, or use --set {shlex.quote(key)}=..."
            )
        elif key in ("model.path", "adapter.from") and not path.isprintable():  # no adapter could name its origin
            yield Conflict(key, f"{path!a} has characters that cannot be printed", "rename it, or link to it")
    output = normpath(recipe.output)
    for key, path in _all_paths(recipe):
        if key != "output" and normpath(path) == output:
            yield Conflict("output", f"'{shorten(recipe.output)}' is {key} too", "write another folder", (key,))
    source = recipe.adapter.source
    if source is not None and PurePath(abspath(output)) in PurePath(abspath(source)).parents:
        message = f"'{shorten(recipe.output)}' contains adapter.from, {shorten(source)}, which this run would replace"
        yield Conflict("output", message, "write another folder", ("adapter.from",))
    if output == "-":
        yield Conflict("output", "'-' is standard output, and a run is a folder", "write a folder")
    if PurePath(output).suffix in (*DATA_SUFFIXES, ".yaml", ".yml", ".gguf", ".safetensors"):
        yield Conflict("output", f"'{shorten(recipe.output)}' looks like a file", "write a folder")


def _all_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model.path", recipe.model.path
    for key, value in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if isinstance(value, list):
            yield from ((f"{key}[{index}].path", source.path) for index, source in enumerate(value))
        elif isinstance(value, str):
            yield key, value
    if recipe.adapter.source is not None:
        yield "adapter.from", recipe.adapter.source
    yield "output", recipe.output


def _is_none(text: str) -> bool:
    return text.strip().lower() in ("", "none", "nil")


# In the order in which the conflicts of one line are printed.
RULES: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    _check_model,
    _check_quantization,
    check_method,
    check_patterns,
    check_target_modules,
    _check_task,
    _check_generation,
    _check_sources,
    _check_eval,
    _check_formats,
    _check_split,
    _check_message_names,
    _check_max_loss,
    check_steps,
    check_batches,
    check_step_size,
    check_schedule,
    check_optimizer,
    check_evaluations,
    check_sharding,
    check_tracking,
    _check_paths,
)
