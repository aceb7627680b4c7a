"""Rules between the fields of a recipe: a value without effect is refused, never ignored. No torch."""

import re
from collections.abc import Callable, Iterator
from itertools import combinations
from os.path import exists, expanduser, isdir, normpath
from pathlib import PurePath
from typing import NamedTuple

from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.problem import join_words, shorten
from lora_cli.recipe.schema import AdapterSpec, QuantizationSpec, Recipe, SourceSpec
from lora_cli.recipe.tasks import TASK_FORMATS
from lora_cli.recipe.yaml_scalars import parse_scalar

ROW_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
NO_CONVERSATION = {"text", "tokens", "classification", "tagging"}


class Conflict(NamedTuple):
    """Values that do not go together."""

    key: str  # where it is reported
    found: str
    fix: str
    depends_on: tuple[str, ...] = ()  # the other keys it hangs on


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Every rule that the recipe breaks."""
    for rule in RULES:
        yield from rule(recipe)


def _model(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    gguf = model.path.endswith(".gguf")
    local = gguf or model.path.startswith((".", "/")) or isdir(model.path)
    if model.revision is not None and local:
        fix = "remove it: only hub models have revisions"
        yield Conflict("model.revision", "has no effect on a local model", fix, ("model.path",))
    if model.trust_remote_code and gguf:
        yield Conflict("model.trust_remote_code", "has no effect on a .gguf file", "remove it", ("model.path",))
    if model.gguf != "auto" and not gguf:
        yield Conflict("model.gguf", "has no effect on a model that is no .gguf file", "remove it", ("model.path",))
    if model.gguf == "packed" and recipe.quantization is not None:
        found = "a base that stays packed is quantised already"
        yield Conflict("model.gguf", found, "remove the quantization section, or write dequantized", ("quantization",))
    for index, token in enumerate(model.new_tokens):
        if not token.strip() or token in model.new_tokens[:index]:
            found = "an empty token" if not token.strip() else f"'{shorten(token)}' is listed twice"
            yield Conflict(f"model.new_tokens[{index}]", found, "remove it")
    yield from _untaught(recipe)
    if model.revision is not None and _is_none(model.revision):
        yield Conflict("model.revision", f"'{model.revision}' is read as a branch", "write null for none")
    if model.attention.lower().replace("-", "_") in ("flash", "flash_attn", "flash_attention", "fa2"):
        found = f"'{shorten(model.attention)}' is no name of transformers"
        yield Conflict("model.attention", found, "did you mean flash_attention_2?")


def _untaught(recipe: Recipe) -> Iterator[Conflict]:
    """New tokens that would stay what they start as: the mean of all others."""
    adapter = recipe.adapter
    if adapter.modules_to_save:  # embeddings, by a name that only the model knows
        return
    fix = "list it in adapter.trainable_tokens too"
    if "trainable_tokens" not in METHOD_FACTS[adapter.method].options:
        fix = "write adapter.modules_to_save: [embed_tokens, lm_head], or method lora with trainable_tokens"
    new = recipe.model.new_tokens
    for index, token in enumerate(new):
        if token.strip() and token not in (*new[:index], *(adapter.trainable_tokens or ())):
            found = f"nothing teaches '{shorten(token)}': it would stay an average token"
            reads = ("adapter.trainable_tokens", "adapter.modules_to_save", "adapter.method")
            yield Conflict(f"model.new_tokens[{index}]", found, fix, reads)


def _quantization(recipe: Recipe) -> Iterator[Conflict]:
    spec = recipe.quantization
    if spec and spec.bits == 8:
        if recipe.data.packing:
            found = (
                "8-bit layers (LLM.int8) choose their outlier columns over the whole batch: packed rows change others"
            )
            yield Conflict("data.packing", found, "write packing: false, or bits: 4", ("quantization.bits",))
        for name in ("type", "double_quant", "storage_dtype"):
            if getattr(spec, name) is not None:
                key = f"quantization.{name}"
                yield Conflict(key, "has no effect with 8 bits", "remove it, or write bits: 4", ("quantization.bits",))
        # The default passes: it stands in every resolved recipe.
        if spec.compute_dtype != QuantizationSpec.model_fields["compute_dtype"].default:
            key, fix = "quantization.compute_dtype", "remove it, or write bits: 4"
            yield Conflict(key, "has no effect with 8 bits", fix, ("quantization.bits",))


def _method(recipe: Recipe) -> Iterator[Conflict]:
    """What the adapter method takes, and what it allows the rest of the recipe."""
    spec, facts = recipe.adapter, METHOD_FACTS[recipe.adapter.method]
    by = f"method {spec.method}"
    for name in AdapterSpec.model_fields:
        if name != "method" and name not in facts.options and getattr(spec, name) is not None:
            takers = [other for other, its in METHOD_FACTS.items() if name in its.options]
            fix = f"remove it; it belongs to {join_words(list(takers), 'and')}" if len(takers) < 4 else "remove it"
            yield Conflict(f"adapter.{name}", f"has no effect with {by}", fix, ("adapter.method",))
    if recipe.task not in facts.tasks:
        fix = f"write another method, or {join_words(list(facts.tasks))} as the task"
        yield Conflict("adapter.method", f"{spec.method} cannot learn {recipe.task}", fix, ("task",))
    if recipe.data.packing and not facts.packs:
        found = f"{by} puts its positions before a row, so that a batch holds one row a line"
        yield Conflict("data.packing", found, "write packing: false, or remove it", ("adapter.method",))
    if recipe.training.gradient_checkpointing is True and spec.method == "prefix":
        found = "method prefix hands its keys and values over in the cache, which recomputation has none of"
        yield Conflict("training.gradient_checkpointing", found, "write false, or auto", ("adapter.method",))
    bits = recipe.quantization.bits if recipe.quantization else None
    reads = ("quantization", "quantization.bits")
    if facts.needs_bits and bits != facts.needs_bits:
        fix = f"write quantization: {{bits: {facts.needs_bits}}}, or another method"
        yield Conflict(
            "adapter.method", f"{spec.method} corrects a {facts.needs_bits}-bit base, and none is asked for", fix, reads
        )
    elif bits and bits not in facts.bits:
        reason = facts.no_quantization or f"PEFT computes it over {join_words([str(b) for b in facts.bits])} bits only"
        fix = (
            f"write bits: {facts.bits[0]}, or method lora"
            if facts.bits
            else "remove the quantization section, or write method lora"
        )
        yield Conflict("adapter.method", f"{spec.method} trains over no {bits}-bit base: {reason}", fix, reads)
    if spec.final_rank and spec.rank and spec.final_rank > spec.rank:
        found = f"{spec.final_rank} is more than the rank that adalora starts with, {spec.rank}"
        yield Conflict("adapter.final_rank", found, "lower it, or raise adapter.rank", ("adapter.rank",))
    if spec.method == "ia3":
        yield from _ia3(spec)
    for key in ("modules_to_save", "trainable_tokens", "layers", "feedforward_modules"):
        yield from _listed(f"adapter.{key}", getattr(spec, key))


def _ia3(spec: AdapterSpec) -> Iterator[Conflict]:
    """Without target modules PEFT's table says what is scaled, and how; nothing can be added to it."""
    reads = ("adapter.target_modules",)
    for key in ("exclude_modules", "feedforward_modules"):
        if spec.target_modules is None and getattr(spec, key):
            found = "without target_modules the architecture's own are taken, and this is not looked at"
            yield Conflict(f"adapter.{key}", found, "write target_modules too, or remove it", reads)
    if isinstance(spec.target_modules, list) and spec.feedforward_modules:
        for index, name in enumerate(spec.feedforward_modules):
            if name and name not in spec.target_modules:
                found = f"{shorten(name)} is none of target_modules"
                yield Conflict(f"adapter.feedforward_modules[{index}]", found, "list it there too", reads)


def _listed(key: str, given: list[str] | list[int] | None) -> Iterator[Conflict]:
    """Repeated and empty entries, and the empty list, which says nothing."""
    if given == []:
        yield Conflict(key, "an empty list", "remove it")
    for index, item in enumerate(given or []):
        if item == "":
            yield Conflict(f"{key}[{index}]", "an empty name", "remove it")
        elif item in (given or [])[:index]:
            yield Conflict(f"{key}[{index}]", f"'{shorten(str(item))}' is listed twice", "keep one")


def _patterns(recipe: Recipe) -> Iterator[Conflict]:
    """Regexes over names of modules, target_modules aside."""
    spec = recipe.adapter
    for key in ("rank_pattern", "alpha_pattern"):
        if getattr(spec, key) == {}:
            yield Conflict(f"adapter.{key}", "an empty section", "remove it")
        for pattern in getattr(spec, key) or ():
            yield from _regex(f"adapter.{key}", pattern)
    if isinstance(spec.exclude_modules, list):
        yield from _listed("adapter.exclude_modules", spec.exclude_modules)
    elif spec.exclude_modules is not None:
        yield from _regex("adapter.exclude_modules", spec.exclude_modules)


def _regex(key: str, pattern: str) -> Iterator[Conflict]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Conflict(key, f"'{shorten(pattern)}' is no regex ({error})", "mend it, or write a list of names")


def _target_modules(recipe: Recipe) -> Iterator[Conflict]:
    key = "adapter.target_modules"
    given = recipe.adapter.target_modules
    if given is None:
        return
    if isinstance(given, list):
        if not given:
            yield Conflict(key, "an empty list adapts no layer", "name modules, or write all-linear")
        for index, name in enumerate(given):
            if not name:
                yield Conflict(f"{key}[{index}]", "an empty name", "remove it")
            elif name in given[:index]:
                yield Conflict(f"{key}[{index}]", f"'{shorten(name)}' is listed twice", "keep one")
            elif _is_all(name):
                fix = "write target_modules: all-linear, without the list"
                yield Conflict(f"{key}[{index}]", f"'{shorten(name)}' in a list is a module of that name", fix)
        return
    if given == "all-linear":
        return
    if not given:
        yield Conflict(key, "an empty text names no module", "name modules, or write all-linear")
        return
    words = [word.strip() for word in given.split(",")]
    if _is_all(given):
        yield Conflict(key, f"'{shorten(given)}' names no module", "did you mean all-linear?")
    elif all(re.fullmatch(r"\w+", word) for word in words):
        found = f"'{shorten(given)}' is a regex over full names, and matches none"
        yield Conflict(key, found, f"write a list: [{shorten(', '.join(words))}]")
    else:
        yield from _regex(key, given)


def _is_all(name: str) -> bool:
    return name.lower().replace("_", "-") in ("all", "all-linear", "alllinear", "linear", "auto")


def _sources(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    for key, given in (("data.train", data.train), ("data.eval", data.eval)):
        if given == []:
            fix = "name a path" if key == "data.train" else "name a path, or write null for none"
            yield Conflict(key, "an empty list of sources", fix)
        if isinstance(given, str) and "," in given and not exists(given):
            fix = "for several sources, write a list of {path: ...}"
            yield Conflict(key, f"'{shorten(given)}' is one path with a comma in it", fix)
        if isinstance(given, list):
            for (_, one), (index, two) in combinations(enumerate(given), 2):
                if one.model_copy(update={"weight": two.weight}) == two:
                    fix = "remove it; to see rows more often, raise the weight of the first"
                    yield Conflict(f"{key}[{index}]", f"'{shorten(two.path)}' is listed twice", fix)


def _eval(recipe: Recipe) -> Iterator[Conflict]:
    data, key = recipe.data, "data.eval"
    if isinstance(data.eval, str):
        word = data.eval.lower()
        if word in ("", "no", "off", "none", "false"):
            yield Conflict(key, f"'{data.eval}' is read as a path", "write null for none")
        elif isinstance(number := parse_scalar(word.removesuffix("%")), int | float):
            fix = f"write {number / 100:g}" if word.endswith("%") else "remove the quotes"
            yield Conflict(key, f"'{shorten(data.eval)}' is read as a path", fix)
    for one in _as_sources(data.train):
        for two in _as_sources(data.eval):
            # The same hub id is no leak by itself: train and eval take different splits of it.
            same_part = one.split == two.split if one.split and two.split else one.path.endswith(ROW_FILES)
            if normpath(one.path) == normpath(two.path) and same_part:
                fix = "name other rows, or hold a fraction out: 0.05"
                yield Conflict(key, f"'{shorten(two.path)}' is trained on too", fix, ("data.train",))


def _as_sources(given: str | float | list[SourceSpec] | None) -> list[SourceSpec]:
    if isinstance(given, str):
        return [SourceSpec(path=given)] if given else []
    return given if isinstance(given, list) else []


def _formats(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.chat_template is not None and _is_none(data.chat_template):
        found = f"'{shorten(data.chat_template)}' is read as a template"
        yield Conflict("data.chat_template", found, "write null for the tokenizer's own")
    formats = {source.format or data.format for source in _as_sources(data.train)}
    if not formats or not formats <= NO_CONVERSATION:
        return
    found = f"has no effect on rows of format {' and '.join(sorted(formats))}"
    reads = ("data.format", "data.train")
    if data.chat_template is not None:
        yield Conflict("data.chat_template", found, "remove it", reads)
    if data.loss_on == "last-turn":
        yield Conflict("data.loss_on", found, "remove it: they have no turns", reads)


def _task(recipe: Recipe) -> Iterator[Conflict]:
    """What the task makes of the rows, and which keys say nothing to it."""
    task, data = recipe.task, recipe.data
    fitting = TASK_FORMATS[task]
    given = [("data.format", data.format)]
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        if isinstance(sources, list):
            given += [(f"{key}[{i}].format", source.format or "auto") for i, source in enumerate(sources)]
    for key, name in given:
        if name != "auto" and name not in fitting:
            fix = f"write {join_words(list(fitting))}, or auto"
            yield Conflict(key, f"rows of format {name} hold nothing that {task} learns", fix, ("task",))
    if data.labels != "auto" and task not in ("seq-cls", "token-cls"):
        yield Conflict("data.labels", f"has no effect with task {task}", "remove it", ("task",))
    if data.labels == "regression" and task == "token-cls":
        yield Conflict("data.labels", "words have labels, no numbers to come near to", "write their names", ("task",))
    if isinstance(data.labels, list):
        yield from _listed("data.labels", data.labels)
    if recipe.training.label_smoothing and data.labels == "regression":
        key = "training.label_smoothing"
        yield Conflict(key, "has no effect on a regression", "remove it", ("data.labels",))
    if task == "causal-lm":
        return
    if data.packing:
        found = f"rows of task {task} are read as a whole, each by itself"
        yield Conflict("data.packing", found, "write packing: false, or remove it", ("task",))
    for key, value, default in (("chat_template", data.chat_template, None), ("loss_on", data.loss_on, "assistant")):
        if value != default:
            yield Conflict(f"data.{key}", f"has no effect with task {task}", "remove it", ("task",))
    if recipe.training.neftune_alpha and task == "seq2seq-lm":
        found = "its noise is defined for the embeddings of one text, and seq2seq-lm reads two"
        yield Conflict("training.neftune_alpha", found, "remove it", ("task",))
    if recipe.generation != type(recipe.generation)() and task != "seq2seq-lm":
        yield Conflict("generation", f"has no effect with task {task}", "remove it", ("task",))


def _generation(recipe: Recipe) -> Iterator[Conflict]:
    spec = recipe.generation
    if spec.length_penalty is not None and spec.num_beams == 1:
        fix = "remove it, or write more num_beams"
        yield Conflict("generation.length_penalty", "has no effect without beams", fix, ("generation.num_beams",))
    if spec.temperature and spec.num_beams > 1:
        fix = "remove it, or write num_beams: 1"
        yield Conflict("generation.temperature", "beams are searched, not drawn", fix, ("generation.num_beams",))
    if spec.top_p < 1 and not spec.temperature:
        fix = "write a temperature too, or remove it"
        yield Conflict("generation.top_p", "has no effect where nothing is drawn", fix, ("generation.temperature",))


def _loss_of_rows(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.max_loss and data.overlong == data.on_bad_row == "error":
        found = "has no effect where the first lost row stops the run"
        fix = "write overlong: drop or on_bad_row: skip, or remove it"
        yield Conflict("data.max_loss", found, fix, ("data.overlong", "data.on_bad_row"))


def _steps(recipe: Recipe) -> Iterator[Conflict]:
    training = recipe.training
    if training.epochs is not None and training.max_steps is not None:
        later = ("training.epochs",)
        yield Conflict("training.max_steps", "epochs and max_steps are both set", "keep one", later)
    if training.warmup >= 1 and not training.warmup.is_integer():
        found = f"{training.warmup:g} is neither a fraction below 1 nor a whole number of steps"
        yield Conflict("training.warmup", found, f"write {training.warmup:.0f} for steps")
    elif training.warmup >= 1 and training.max_steps and training.warmup > training.max_steps:
        found = f"{training.warmup:g} steps of warmup do not fit into {training.max_steps} steps"
        fix = "write fewer, or a fraction such as 0.03"
        yield Conflict("training.warmup", found, fix, ("training.max_steps",))


def _batches(recipe: Recipe) -> Iterator[Conflict]:
    training, data = recipe.training, recipe.data
    if not data.packing and training.tokens_per_batch is not None:
        fix = "write batch_size, or packing: true"
        yield Conflict("training.tokens_per_batch", "has no effect without packing", fix, ("data.packing",))
    if data.packing and training.batch_size is not None:
        fix = "write tokens_per_batch, or `data: {packing: false}`"
        yield Conflict("training.batch_size", "has no effect with packing", fix, ("data.packing",))
    if data.packing and training.tokens_per_batch and training.tokens_per_batch < data.max_length:
        found = f"{training.tokens_per_batch} is less than data.max_length, {data.max_length}"
        fix = "a batch has to hold the longest row: raise it, or lower data.max_length"
        yield Conflict("training.tokens_per_batch", found, fix, ("data.packing", "data.max_length"))


def _paths(recipe: Recipe) -> Iterator[Conflict]:
    for key, path in _all_paths(recipe):
        if path.startswith("~"):
            yield Conflict(key, "`~` is not filled in", f"write the folder out: {shorten(expanduser(path))}")
        elif re.search(r"\$\w|\$\{", path):
            yield Conflict(key, "variables are not filled in", f"write it out, or use --set {key}=...")
    output = normpath(recipe.output)
    for key, path in _all_paths(recipe):
        if key != "output" and normpath(path) == output:
            yield Conflict("output", f"'{shorten(recipe.output)}' is {key} too", "name a folder of its own", (key,))
    if PurePath(output).suffix in (*ROW_FILES, ".yaml", ".yml", ".gguf", ".safetensors"):
        yield Conflict("output", f"'{shorten(recipe.output)}' is named like a file", "name a folder")


def _all_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model.path", recipe.model.path
    for key, given in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if isinstance(given, list):
            yield from ((f"{key}[{index}].path", source.path) for index, source in enumerate(given))
        elif isinstance(given, str):
            yield key, given
    yield "output", recipe.output


def _is_none(word: str) -> bool:
    return word.strip().lower() in ("", "none", "nil")


RULES: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    _model,
    _quantization,
    _method,
    _patterns,
    _target_modules,
    _task,
    _generation,
    _sources,
    _eval,
    _formats,
    _loss_of_rows,
    _steps,
    _batches,
    _paths,
)
