"""Verify an ONNX export: compare its weights with the model's, and logits and texts of onnxruntime and transformers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import PreTrainedModel

from lora_cli.data.token_text import token_texts
from lora_cli.export.onnx.graph import BATCH, PAST, GraphSignature, GraphValue
from lora_cli.export.reference import eos_ids
from lora_cli.export.source import Check, ExportSource

MAX_DIFFERENCE = 1e-4  # relative to the largest logit: bound for sums in another order in fp32
MAX_NEW_TOKENS = 32  # per prompt
LARGE_CONSTANT = 1024  # values; constants of at least this size are counted in the report
DTYPES = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.INT64: torch.int64}

Floats = NDArray[np.float32]


def check_tensors(model: PreTrainedModel, signature: GraphSignature, file: Path) -> Check:
    """Check that `file` is valid ONNX, has the expected inputs and outputs, and stores each parameter bit for bit."""
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as reason:
        return Check("tensors", False, f"not valid ONNX: {str(reason).splitlines()[0]}")
    graph = onnx.load(str(file), load_external_data=False).graph
    stored = GraphSignature(tuple(map(_graph_value, graph.input)), tuple(map(_graph_value, graph.output)))
    mismatched = [value.name for a, b in zip(stored, signature, strict=True) for value in sorted({*a} ^ {*b}, key=str)]
    tensors = dict(model.named_buffers(remove_duplicate=False))
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    equal: set[int] = set()
    different, constants = [], 0
    for tensor in graph.initializer:
        if tensor.name not in tensors:
            constants += int(np.prod(tensor.dims)) >= LARGE_CONSTANT
            continue
        try:
            values = numpy_helper.to_array(tensor, base_dir=str(file.parent))
        except (ValueError, OSError, onnx.checker.ValidationError) as reason:
            return Check("tensors", False, f"{tensor.name} cannot be read: {' '.join(str(reason).split())}")
        expected = tensors[tensor.name].detach().numpy()
        if np.array_equal(values, expected, equal_nan=True):
            equal.add(id(tensors[tensor.name]))
        else:
            different.append(tensor.name)
        tensor.ClearField("raw_data")  # keep one tensor in memory at a time
    parameters = dict(model.named_parameters())
    missing = [name for name, parameter in parameters.items() if id(parameter) not in equal and name not in different]
    count = sum(id(parameter) in equal for parameter in parameters.values())
    text = f"{count} of {len(parameters)} parameters read back, equal bit for bit; "
    text += f"{len(signature.inputs)} inputs and {len(signature.outputs)} outputs"
    text += " as expected" if not mismatched else f", and {mismatched[0]} does not match"
    text += f"; {len(different)} differ: {different[0]}" if different else ""
    text += f"; {len(missing)} are missing: {missing[0]}" if missing else ""
    text += f"; {constants} other large constants" if constants else ""
    figures = {"parameters": len(parameters), "equal": count, "off": len(different), "lacking": len(missing)}
    return Check("tensors", not (mismatched or different or missing), text, figures)


def _graph_value(value: onnx.ValueInfoProto) -> GraphValue:
    tensor_type = value.type.tensor_type
    shape = tuple(size.dim_param or size.dim_value for size in tensor_type.shape.dim)
    return GraphValue(value.name, shape, DTYPES.get(tensor_type.elem_type, torch.float64))


def check_outputs(
    source: ExportSource, model: PreTrainedModel, signature: GraphSignature, file: Path
) -> Iterator[Check]:
    """Run the prompts in onnxruntime and in transformers, and yield the checks of logits and of texts or labels."""
    prompts = source.prompts or _random_prompts(model.config.get_text_config().vocab_size)
    import onnxruntime  # only here: weights can be checked without it
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    session_errors = (
        errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented,
        errors.NoSuchFile, errors.RuntimeException,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # failures are raised too
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        if source.task == "causal-lm":
            yield from _check_decoder(source, model, OnnxSession(session, signature), prompts)
        else:
            yield from _check_classifier(source, model, OnnxSession(session, signature), prompts)
    except session_errors as reason:
        yield Check("logits", False, f"onnxruntime cannot run it: {str(reason).splitlines()[0]}")


def _random_prompts(vocabulary: int) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(0)
    return tuple(tuple(rng.integers(0, vocabulary, length).tolist()) for length in (5, 17, 40))


class OnnxSession:
    """The graph in onnxruntime."""

    def __init__(self, session: Any, signature: GraphSignature) -> None:
        self._session, self._signature = session, signature

    def run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], past: Sequence[Floats] = ()
    ) -> tuple[Floats, list[Floats]]:
        """Run the graph on new tokens.

        Args:
            ids: `[batch, seq]` int64, the tokens after those in `past`.
            mask: `[batch, past + seq]` int64, 0 at padding.
            past: `[batch, heads, past, head_dim]` fp32, key and value of each layer; () for an empty cache.

        Returns:
            The logits (fp32: `[batch, seq, vocab]` of a decoder, `[batch, labels]` or `[batch, seq, labels]` of a
            classifier), and the cache with the new tokens.
        """
        cache = past or [self._empty_cache(value, len(ids)) for value in self._signature.cache]
        inputs: dict[str, NDArray[Any]] = dict(self.inputs(ids, mask))
        inputs |= {value.name: tensor for value, tensor in zip(self._signature.cache, cache, strict=True)}
        logits, *present = self._session.run([value.name for value in self._signature.outputs], inputs)
        return logits, present

    def inputs(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return the inputs of the graph except the cache, by name: `[batch, seq]` int64, and `mask` unchanged."""
        positions = (mask.cumsum(axis=1) - 1).clip(0)[:, -ids.shape[1] :]
        # For encoders that read pairs of texts, the second half of each row is the second text.
        types = np.broadcast_to(np.arange(ids.shape[1]) * 2 // ids.shape[1], ids.shape).astype(np.int64)
        available = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "token_type_ids": types}
        return {value.name: available[value.name] for value in self._signature.inputs if value.name in available}

    @staticmethod
    def _empty_cache(value: GraphValue, rows: int) -> Floats:
        sizes = {BATCH: rows, PAST: 0}
        shape = [sizes[size] if isinstance(size, str) else size for size in value.shape]
        return np.zeros(shape, np.float32)


class GreedyRun(NamedTuple):
    """The greedy continuation of one prompt."""

    prefill: Floats  # [seq, vocab] fp32: logits of the prompt
    steps: list[Floats]  # [vocab] fp32 each: logits from which each token was chosen; the first is the end of `prefill`
    tokens: list[int]  # chosen tokens, including a final EOS


class LogitDifference:
    """The largest difference between the logits of both runtimes so far."""

    def __init__(self) -> None:
        self.relative, self.positions = 0.0, 0  # difference divided by the largest logit; positions compared
        self.tie = 0.0  # a smaller lead of one token over another is a tie: the logit of each can be off by half of it

    def add(self, logits: Floats, expected: Floats) -> None:
        """Include logits `[positions, classes]` fp32 of the graph, and the expected ones of the same shape."""
        worst, largest = float(np.abs(logits - expected).max()), max(float(np.abs(expected).max()), 1e-30)
        self.relative = max(self.relative, worst / largest if np.isfinite(worst) else np.inf)
        # Bounded: only a difference that another order of summation can cause makes the choice of another token a tie.
        self.tie = max(self.tie, 2 * min(worst, MAX_DIFFERENCE * largest))
        self.positions += len(expected)

    def check(self, compared: str) -> Check:
        """Return the result for everything that was compared."""
        text = f"{compared}: {self.positions} positions differ by at most {self.relative:.1e} of the largest logit"
        text += f" (limit {MAX_DIFFERENCE:g})"
        figures = {"apart": self.relative, "positions": self.positions}
        return Check("logits", self.relative <= MAX_DIFFERENCE, text, figures)


def _check_decoder(
    source: ExportSource, model: PreTrainedModel, graph: OnnxSession, prompts: Sequence[Sequence[int]]
) -> Iterator[Check]:
    stops = eos_ids(source)
    difference = LogitDifference()
    same, ties, example = 0, 0, ""
    expected_runs = [_run_transformers(model, prompt, stops) for prompt in prompts]
    for prompt, expected in zip(prompts, expected_runs, strict=True):
        run = _run_onnx(graph, prompt, stops)
        difference.add(run.prefill, expected.prefill)
        at = next((i for i, (a, b) in enumerate(zip(expected.tokens, run.tokens, strict=False)) if a != b), None)
        comparable = min(len(expected.tokens), len(run.tokens)) if at is None else at + 1
        for expected_step, step in zip(expected.steps[1:comparable], run.steps[1:comparable], strict=True):
            difference.add(step[None], expected_step[None])
        if at is None:
            same += 1
            continue
        logits = expected.steps[at]
        if logits[expected.tokens[at]] - logits[run.tokens[at]] <= difference.tie:
            ties += 1
            continue
        texts = (token_texts(tokens[: at + 1], source.tokenizer)[-3:] for tokens in (expected.tokens, run.tokens))
        before, after = ("".join(part) for part in texts)
        example = example or f"{before!r} became {after!r}, at token {at + 1}"
    _compare_padded(model, graph, prompts, expected_runs, stops, difference)
    yield difference.check("prompts, token by token with the cache, and two rows padded on the left")
    text = f"{same} of {len(prompts)} prompts have the same greedy continuation and end as in transformers"
    text += f"; {ties} differ where two tokens are equally likely" if ties else ""
    text += f"; first difference: {example}" if example else ""
    yield Check("text", not example, text, {"prompts": len(prompts), "same": same, "ties": ties})


@torch.no_grad()
def _run_transformers(model: PreTrainedModel, prompt: Sequence[int], stops: Sequence[int]) -> GreedyRun:
    """Continue `prompt` greedily in transformers, alone in its batch and with the model's default cache."""
    outputs = model(input_ids=torch.tensor([list(prompt)]), use_cache=True)
    prefill: Floats = outputs.logits[0].numpy()
    steps, tokens = [prefill[-1]], [int(prefill[-1].argmax())]
    while tokens[-1] not in stops and len(tokens) < MAX_NEW_TOKENS:
        outputs = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=outputs.past_key_values, use_cache=True)
        steps.append(outputs.logits[0, -1].numpy())
        tokens.append(int(steps[-1].argmax()))
    return GreedyRun(prefill, steps, tokens)


def _run_onnx(graph: OnnxSession, prompt: Sequence[int], stops: Sequence[int]) -> GreedyRun:
    """Continue `prompt` greedily in onnxruntime."""
    logits, past = graph.run(np.array([prompt]), np.ones((1, len(prompt)), np.int64))
    prefill = logits[0]
    steps, tokens = [prefill[-1]], [int(prefill[-1].argmax())]
    while tokens[-1] not in stops and len(tokens) < MAX_NEW_TOKENS:
        logits, past = graph.run(np.array([tokens[-1:]]), np.ones((1, len(prompt) + len(tokens)), np.int64), past)
        steps.append(logits[0, -1])
        tokens.append(int(steps[-1].argmax()))
    return GreedyRun(prefill, steps, tokens)


def _compare_padded(
    model: PreTrainedModel,
    graph: OnnxSession,
    prompts: Sequence[Sequence[int]],
    expected_runs: Sequence[GreedyRun],
    stops: Sequence[int],
    difference: LogitDifference,
) -> None:
    """Run the longest and a shorter prompt as one batch, with one more token each, and compare with each row alone."""
    longest, shortest = (choose(range(len(prompts)), key=lambda i: len(prompts[i])) for choose in (max, min))
    rows, separate = [prompts[longest], prompts[shortest]], [expected_runs[longest], expected_runs[shortest]]
    if len(rows[0]) == len(rows[1]):
        rows[1] = rows[1][: (len(rows[1]) + 1) // 2]
        separate[1] = _run_transformers(model, rows[1], stops)
    width = len(rows[0])
    ids = np.array([[0] * (width - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    logits, past = graph.run(ids, mask)
    next_ids = np.array([[run.tokens[0]] for run in separate])
    next_logits, _ = graph.run(next_ids, np.concatenate([mask, np.ones_like(next_ids)], axis=1), past)
    for row, run in enumerate(separate):
        difference.add(logits[row, width - len(rows[row]) :], run.prefill)
        if len(run.steps) > 1:  # else the first token ended the answer
            difference.add(next_logits[row], run.steps[1][None])


def _check_classifier(
    source: ExportSource, model: PreTrainedModel, graph: OnnxSession, prompts: Sequence[Sequence[int]]
) -> Iterator[Check]:
    kind = source.labels.kind if source.labels else "single"
    difference = LogitDifference()
    rows: list[tuple[Floats, Floats]] = []  # [labels] fp32 each: logits of the graph, expected logits
    for ids, mask in _batches(prompts, pad=int(getattr(model.config, "pad_token_id", None) or 0)):
        logits, _ = graph.run(ids, mask)
        expected = _transformers_logits(model, graph.inputs(ids, mask))
        if source.task == "token-cls":
            logits, expected = logits[mask == 1], expected[mask == 1]
        difference.add(logits, expected)
        rows += list(zip(logits, expected, strict=True))
    yield difference.check("rows one by one, and two rows of a batch padded on the right")
    if kind == "regression":
        return
    same, ties = 0, 0
    for logits, expected in rows:
        if _labels(logits, kind) == _labels(expected, kind):
            same += 1
        elif _margin(expected, logits, kind) <= difference.tie:
            ties += 1
    text = f"{same} of {len(rows)} get the same labels"
    text += f"; {ties} differ where two labels are equally likely" if ties else ""
    yield Check("labels", same + ties == len(rows), text, {"rows": len(rows), "same": same, "ties": ties})


def _batches(prompts: Sequence[Sequence[int]], *, pad: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield ids and mask, `[batch, seq]` int64 each.

    Each prompt is a batch; in the last batch, the longest prompt is one row, and its padded first half is the other.
    """
    for prompt in prompts:
        yield np.array([prompt]), np.ones((1, len(prompt)), np.int64)
    longest = max(prompts, key=len)
    half = (len(longest) + 1) // 2
    padding = len(longest) - half
    yield (
        np.array([longest, [*longest[:half], *[pad] * padding]]),
        np.array([[1] * len(longest), [1] * half + [0] * padding]),
    )


@torch.no_grad()
def _transformers_logits(model: PreTrainedModel, inputs: Mapping[str, NDArray[np.int64]]) -> Floats:
    logits: Floats = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.numpy()
    return logits


def _labels(logits: Floats, kind: str) -> list[int]:
    """Return the ids of the predicted labels for logits `[labels]`."""
    return [int(logits.argmax())] if kind == "single" else (logits > 0).nonzero()[0].tolist()


def _margin(expected: Floats, logits: Floats, kind: str) -> float:
    """Return how much the expected logits `[labels]` would have to change to predict the labels of `logits`."""
    if kind == "single":
        return float(expected.max() - expected[logits.argmax()])
    return float(np.abs(expected[(expected > 0) != (logits > 0)]).max())
