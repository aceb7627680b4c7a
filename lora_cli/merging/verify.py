"""Verify a merge in flat memory: compare every written weight with PEFT's merge, and the models by their logits.

Base and adapter, and the merged model, run on a few probe rows with streamed weights: never is more than one weight of
them in memory.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError
from lora_cli.merging import check_weights, compare_models, streamed_models
from lora_cli.merging.compare_models import Agreement
from lora_cli.merging.merge_tensors import thread_pool
from lora_cli.merging.streamed_models import AdaptedModel, MergedModel, Streams
from lora_cli.model.checkpoint_reader import Transforms
from lora_cli.model.safetensors_io import ShardFiles
from lora_cli.model.saved_adapter import SavedAdapter, trained_tokens
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import console

MAX_THREADS = 16  # each needs memory for a block
MIN_RETAINED = 0.5  # of the adapter's effect on the logits
# A model is read and multiplied once for each of three runs: more tokens than these would take longer than writing it.
MIN_TOKENS, MAX_TOKENS = 48, 512
TOKEN_WEIGHTS = 6 * 10**10  # tokens times weights
MAX_LOGITS = 1 << 24  # of one model


class Probes(NamedTuple):
    """Rows that the models are compared on."""

    batch: Batch
    description: str


def probe_tokens(parameters: int, vocabulary: int) -> int:
    """Return how many tokens to compare models on: fewer for large models, which take as long for each as for writing.

    Args:
        parameters: of the model.
        vocabulary: outputs of each token.
    """
    return max(MIN_TOKENS, min(MAX_TOKENS, TOKEN_WEIGHTS // parameters, MAX_LOGITS // vocabulary))


def random_probes(adapter: SavedAdapter, tokens: int) -> Probes:
    """Return rows of random tokens, `tokens` together, among them the tokens that the adapter trained."""
    base = adapter.base
    batch = compare_models.random_probes(
        base.task,
        tokens=tokens,
        vocabulary=min(len(base.tokenizer), max(base.vocabulary, base.config.get_text_config().vocab_size)),
        pad_id=base.pad_id or 0,
        start_id=getattr(base.config, "decoder_start_token_id", None),
        end_id=base.tokenizer.eos_token_id if base.task == "seq-cls" else None,
        include=trained_tokens(adapter.files.config),
    )
    return Probes(batch, f"{len(batch.lengths)} rows of random tokens")


@contextmanager
def open_streams() -> Iterator[Streams]:
    """Yield what the streamed models of one verification share."""
    with ShardFiles(writable=False) as files, thread_pool(MAX_THREADS) as pool:
        yield Streams(files, pool)


class BaseWeights(NamedTuple):
    """The weights of the base that the adapter is merged into."""

    transforms: Transforms  # from the stored weights to them
    logits: Tensor | None = None  # of these weights with the adapter on the probes, fp32, if they were measured


def choose_base_weights(
    adapter: SavedAdapter, probes: Probes, spec: QuantizationSpec, dequantized: Transforms, streams: Streams
) -> BaseWeights:
    """Choose the original or the dequantized weights: those that bring the merged model closer to the trained one.

    Args:
        adapter: trained over a quantized base.
        probes: to compare on.
        spec: how the base was quantized.
        dequantized: transforms from original to dequantized weights.
        streams: for the models.
    """
    task = adapter.base.task
    trained = _logits(streamed_models.open_trained(adapter, spec, streams), probes, task)
    choices = {"original": BaseWeights({}), "dequantized": BaseWeights(dequantized)}
    agreements = {}
    for name, choice in choices.items():
        logits = _logits(streamed_models.open_adapted(adapter, choice.transforms, streams), probes, task)
        choices[name] = choice._replace(logits=logits)
        agreements[name] = compare_models.compare_logits(logits, trained, None)
    tokens = not TASKS[task].is_classification
    best = min(agreements, key=lambda name: agreements[name].kl if tokens else agreements[name].max_difference)
    measured = [
        f"{name} " + (f"KL {a.kl:.1e} nats" if tokens else f"{a.max_difference:.1e}") for name, a in agreements.items()
    ]
    console.info(
        f"weights: {best}, closer to the trained {spec.bits}-bit model on {probes.description}: {', '.join(measured)}"
    )
    return choices[best]


class Reference(NamedTuple):
    """The logits that those of a merged model are compared with, fp32 [positions, outputs]."""

    adapted: Tensor  # of base and adapter
    base: Tensor | None  # of the base alone; None for a classifier, whose base has no head of its own


@contextmanager
def verification(
    adapter: SavedAdapter, probes: Probes | None, weights: BaseWeights, streams: Streams
) -> Iterator[Callable[[Path], Agreement | None]]:
    """Run base and adapter while the caller writes the merged model; yield the function that verifies it.

    If the caller fails, the runs end at their next product.

    Args:
        adapter: to be merged.
        probes: to compare the logits on; None to compare the weights alone.
        weights: of the base.
        streams: for the models.

    Yields:
        A function from the folder of the merged model to the agreement of its logits; None without probes. It may be
        called once. It raises a LoraError if a weight is wrong, or too little of the adapter's effect is left.
    """
    task = adapter.base.task
    adapted = streamed_models.open_adapted(adapter, weights.transforms, streams)
    with ThreadPoolExecutor(1) as background:
        reference = background.submit(_run_reference, adapted, weights.logits, probes, task) if probes else None

        def verify(written: Path) -> Agreement | None:
            expected = reference.result() if reference else None
            merged = streamed_models.open_merged(adapter, written, streams)
            _check_weights(adapted, merged, streams)
            return _compare(merged, probes, expected, task) if probes and expected else None

        try:
            yield verify
        except BaseException:
            streams.pool.shutdown(cancel_futures=True)
            raise


def _run_reference(adapted: AdaptedModel, logits: Tensor | None, probes: Probes, task: TaskName) -> Reference:
    """Run base and adapter, unless their logits are known, and the base alone."""
    logits = _logits(adapted, probes, task) if logits is None else logits
    if TASKS[task].is_classification:
        return Reference(logits, None)
    with adapted.model.disable_adapter():
        return Reference(logits, _logits(adapted, probes, task))


def _logits(streamed: AdaptedModel | MergedModel, probes: Probes, task: TaskName) -> Tensor:
    """Return the logits of a model; on one core, except products, which have threads, and quantization."""
    threads = torch.get_num_threads()
    if not streamed.reader.transforms:
        torch.set_num_threads(1)  # small operations on more would wait, and take the cores from the products' threads
    try:
        return compare_models.probe_logits(streamed.model, probes.batch, task)
    finally:
        torch.set_num_threads(threads)


def _check_weights(adapted: AdaptedModel, merged: MergedModel, streams: Streams) -> None:
    """Raise a LoraError if a weight of the merged model is not PEFT's merge; `adapted` cannot be run afterwards."""
    for mismatch in check_weights.mismatches(adapted, merged, streams):
        raise LoraError(
            f"the merged model is wrong: {mismatch.name}, read back, {mismatch.found}",
            hint="nothing was written to --out; use the adapter unmerged, and report this",
            exit_code=1,
        )


def _compare(merged: MergedModel, probes: Probes, reference: Reference, task: TaskName) -> Agreement:
    """Compare the logits of the merged model; raise a LoraError if too little of the adapter's effect is left."""
    logits = _logits(merged, probes, task)
    agreement = compare_models.compare_logits(logits, reference.adapted, reference.base)
    if agreement.retained is not None and not agreement.retained >= MIN_RETAINED:
        raise LoraError(
            f"after rounding, {agreement.retained:.0%} of the adapter's effect on the logits is left",
            hint="write a finer dtype: --dtype float32, or use the adapter unmerged",
            exit_code=1,
        )
    return agreement
