"""`lora merge`: an adapter folded into its base, verified, and written as a model that plain transformers loads."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel

from lora_cli.data import labels as labelling
from lora_cli.data.labels import Labels
from lora_cli.errors import LoraError
from lora_cli.merging import parity
from lora_cli.merging.fold import Folded, fold
from lora_cli.model import base, prequantized
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import ModelSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import atomic, console

# fp32 against fp32: all that differs is the order of sums. Weights in 16 bits are rounded once more.
EXACT = 1e-5
LEAST_SURVIVAL = 0.5  # of an update; below it the model that is written has lost more of it than it kept
STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Merging(NamedTuple):
    """What an adapter folder says of itself."""

    folder: Path
    config: PeftConfig
    task: TaskName
    labels: Labels | None
    base: str
    revision: str | None
    new_tokens: bool  # it comes with a tokenizer, which may know more tokens than the base


def merge(
    folder: Path, *, out: Path, base_path: str | None, dtype: str, force: bool, trust_remote_code: bool = False
) -> None:
    """Write `folder`'s adapter, folded into its base, to `out`.

    Raises:
        LoraError: what is given does not fit together, the method cannot be merged, or the merged model is another one.
    """
    given = _read(folder, base_path)
    _refuse_place(out, given, force=force)
    cpu = torch.device("cpu")
    spec = ModelSpec(path=given.base, revision=given.revision, trust_remote_code=trust_remote_code)
    source = base.locate(spec, dtype=torch.float32, device=cpu, say=console.say)
    config = base.load_config(source)
    if (already := prequantized.recognise(config)) is not None:
        raise LoraError(
            f"{given.base} is quantised ({already.method}): an update is folded into whole weights",
            hint="name the 16-bit model that it was made from: --base PATH",
        )
    written = _written_dtype(dtype, config)
    tokenizer = base.load_tokenizer(source._replace(where=str(folder)) if given.new_tokens else source)
    loaded = base.load_base(
        source,
        dtype=torch.float32,
        device=cpu,
        task=given.task,
        labels=given.labels,
        vocabulary=len(tokenizer) if given.new_tokens else 0,
        pad_id=tokenizer.pad_token_id,
    )
    model = _attach(loaded.model, given)
    batches = parity.probes(
        given.task,
        vocabulary=min(len(tokenizer), model.get_base_model().get_input_embeddings().weight.shape[0]),
        pad_id=tokenizer.pad_token_id or 0,
        start_id=getattr(config, "decoder_start_token_id", None),
        end_id=tokenizer.eos_token_id if given.task == "seq-cls" else None,
        include=_trained_tokens(given.config),
    )
    expected = parity.logits(model, batches, given.task)
    console.say(f"folding {given.config.peft_type.value.lower()} into {given.base}, in fp32")
    folded = list(fold(model, written))
    _refuse_rounded_away(folded, written)
    merged = model.merge_and_unload()
    apart = parity.distance(parity.logits(merged, batches, given.task), expected)
    if not apart <= EXACT:
        raise LoraError(
            f"the merged model is another one: its logits differ from base and adapter by {apart:.1e} in fp32",
            hint="nothing was written; use the adapter as it is",
            exit_code=1,
        )
    for parameter in merged.parameters():  # and no buffer: rotary frequencies stay in fp32, as they do when loaded
        parameter.data = parameter.data.to(written)
    rounded = parity.logits(merged, batches, given.task)
    with atomic.folder(out, replace=force) as partial:
        merged.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        (partial / "README.md").write_text(_card(given), encoding="utf-8")
        again = base.load_base(
            base.Source(str(partial), {"trust_remote_code": trust_remote_code}),
            dtype=written,
            device=cpu,
            task=given.task,
            labels=given.labels,
        )
        if (lost := parity.distance(parity.logits(again.model, batches, given.task), rounded)) > EXACT:
            raise LoraError(
                f"the merged model reads back as another one: its logits differ by {lost:.1e}",
                hint="nothing was put in place; see the space on the disk",
                exit_code=1,
            )
    for line in _report(folded, apart, parity.distance(rounded, expected), written):
        console.say(line)
    console.out.print(str(out))


def _read(folder: Path, base_path: str | None) -> Merging:
    if not (folder / "adapter_config.json").is_file():
        hint = "give the adapter folder of a run: runs/NAME/adapter"
        if (folder / "adapter" / "adapter_config.json").is_file():
            hint = f"did you mean {folder / 'adapter'}?"
        raise LoraError(f"{folder} has no adapter_config.json", hint=hint)
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise LoraError(
            f"{folder}: {config.peft_type.value.lower().replace('_', ' ')} puts virtual tokens before the prompt: "
            "there is nothing to fold into weights",
            hint="load it beside its base, with PEFT, or train another adapter.method",
        )
    known: dict[str, TaskName] = {task.peft: name for name, task in TASKS.items()}
    task = known.get(str(config.task_type or ""), "causal-lm")
    return Merging(
        folder,
        config,
        task,
        labelling.read(folder),
        base_path or config.base_model_name_or_path,
        None if base_path else config.revision,
        (folder / "tokenizer_config.json").is_file(),
    )


def _refuse_place(out: Path, given: Merging, *, force: bool) -> None:
    if out.resolve() == Path(given.base).resolve() or out.resolve() == given.folder.resolve():
        raise LoraError(f"--out {out}: that is what is merged", hint="name another folder")
    if out.exists() and not force:
        raise LoraError(f"--out {out} exists", hint="name another folder, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")


def _trained_tokens(config: PeftConfig) -> list[int]:
    """The tokens whose embeddings the adapter holds."""
    found = getattr(config, "trainable_token_indices", None) or []
    return sorted({token for ids in found.values() for token in ids} if isinstance(found, dict) else found)


def _written_dtype(wanted: str, config: Any) -> torch.dtype:
    """The dtype that the base is stored in, where none is asked for."""
    if wanted != "auto":
        return STORED[wanted]
    stored = config.dtype
    return stored if isinstance(stored, torch.dtype) and stored in STORED.values() else torch.float32


def _attach(model: Any, given: Merging) -> PeftModel:
    try:
        adapted = PeftModel.from_pretrained(model, str(given.folder))
    except (ValueError, RuntimeError) as reason:
        raise LoraError(
            f"{given.folder} does not fit {given.base}: {str(reason).splitlines()[0]}",
            hint="an adapter fits only the base it was trained on; see its adapter_config.json",
        ) from reason
    return adapted.float()


def _refuse_rounded_away(folded: list[Folded], dtype: torch.dtype) -> None:
    if not folded:
        raise LoraError("the adapter changes no weight: it was never trained", hint="train it first")
    worst = min(folded, key=lambda each: each.survived)
    if not (worst.survived >= LEAST_SURVIVAL and math.isfinite(worst.survived)):
        name = str(dtype).removeprefix("torch.")
        raise LoraError(
            f"{worst.name}: of its update {worst.survived:.0%} survives the rounding to {name}",
            hint="write a finer dtype: --dtype float32, or use the adapter as it is",
            exit_code=1,
        )


def _report(folded: list[Folded], exact: float, rounded: float, dtype: torch.dtype) -> list[str]:
    worst = min(folded, key=lambda each: each.survived)
    name = str(dtype).removeprefix("torch.")
    return [
        f"verified: merged is base and adapter, logits within {exact:.0e} in fp32 and {rounded:.0e} in {name}",
        f"of each update, at least {worst.survived:.1%} survives the rounding to {name} ({worst.name})",
    ]


def _card(given: Merging) -> str:
    lines = [
        "---",
        f"base_model: {Path(given.base).name}",
        "---",
        f"# {Path(given.base).name} with an adapter folded in",
    ]
    return "\n".join([*lines, "", f"Merged from a {given.config.peft_type.value} adapter, task {given.task}.", ""])
