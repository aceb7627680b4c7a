"""An ONNX graph against its model: weights read back one by one, logits and texts of both runtimes side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper
from transformers import PreTrainedModel

from lora_cli.export.onnx.graph import BATCH, PAST, GraphSignature, GraphValue
from lora_cli.export.reference import eos_ids
from lora_cli.export.source import Check, ExportSource

MAX_DIFFERENCE = 1e-4  # of the largest logit: what sums in another order may come to in fp32
MAX_NEW_TOKENS = 32  # tokens that a prompt is continued by
LARGE_CONSTANT = 1024  # values of a constant from which it is told of
ELEMENTS = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.INT64: torch.int64}

Floats = NDArray[np.float32]


def check_tensors(model: PreTrainedModel, form: GraphSignature, file: Path) -> Check:
    """The file is ONNX, takes and gives what `form` says, and holds each parameter of `model`, value for value."""
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as reason:
        return Check("tensors", False, f"no valid ONNX: {str(reason).splitlines()[0]}")
    graph = onnx.load(str(file), load_external_data=False).graph
    found = GraphSignature(tuple(map(_port, graph.input)), tuple(map(_port, graph.output)))
    wrong = [port.name for a, b in zip(found, form, strict=True) for port in sorted({*a} ^ {*b}, key=str)]
    held = dict(model.named_buffers(remove_duplicate=False))
    held |= dict(model.named_parameters(remove_duplicate=False))
    same: set[int] = set()
    off, others = [], 0
    for tensor in graph.initializer:
        if tensor.name not in held:
            others += int(np.prod(tensor.dims)) >= LARGE_CONSTANT
            continue
        if external_data_helper.uses_external_data(tensor):
            try:
                external_data_helper.load_external_data_for_tensor(tensor, str(file.parent))
            except (ValueError, OSError) as reason:
                return Check("tensors", False, f"{tensor.name} cannot be read: {' '.join(str(reason).split())}")
        expected = held[tensor.name].detach().numpy()
        if np.array_equal(numpy_helper.to_array(tensor), expected, equal_nan=True):
            same.add(id(held[tensor.name]))
        else:
            off.append(tensor.name)
        tensor.ClearField("raw_data")  # one at a time in memory
    parameters = dict(model.named_parameters())
    lacking = [name for name, parameter in parameters.items() if id(parameter) not in same and name not in off]
    count = sum(id(parameter) in same for parameter in parameters.values())
    said = f"{count} of {len(parameters)} parameters read back, bit for bit; {len(form.inputs)} inputs and "
    said += f"{len(form.outputs)} outputs as named" if not wrong else f"outputs, and {wrong[0]} is not as it should be"
    said += f"; {len(off)} are off: {off[0]}" if off else ""
    said += f"; {len(lacking)} are not there: {lacking[0]}" if lacking else ""
    said += f"; and {others} large constants of its own" if others else ""
    figures = {"parameters": len(parameters), "equal": count, "off": len(off), "lacking": len(lacking)}
    return Check("tensors", not (wrong or off or lacking), said, figures)


def _port(value: onnx.ValueInfoProto) -> GraphValue:
    kind = value.type.tensor_type
    shape = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
    return GraphValue(value.name, shape, ELEMENTS.get(kind.elem_type, torch.float64))


def check_outputs(subject: ExportSource, model: PreTrainedModel, form: GraphSignature, file: Path) -> Iterator[Check]:
    """The prompts through onnxruntime and through transformers."""
    prompts = subject.prompts or _random_prompts(model.config.get_text_config().vocab_size)
    import onnxruntime  # here alone: without it, the weights are checked still
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    refusals = (
        errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented,
        errors.NoSuchFile, errors.RuntimeException,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised, too
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        if subject.task == "causal-lm":
            yield from _decoder(subject, model, OnnxSession(session, form), prompts)
        else:
            yield from _classifier(subject, model, OnnxSession(session, form), prompts)
    except refusals as reason:
        yield Check("logits", False, f"onnxruntime cannot run it: {str(reason).splitlines()[0]}")


def _random_prompts(vocabulary: int) -> tuple[tuple[int, ...], ...]:
    draw = np.random.default_rng(0)
    return tuple(tuple(draw.integers(0, vocabulary, length).tolist()) for length in (5, 17, 40))


class OnnxSession:
    """The graph in onnxruntime."""

    def __init__(self, session: Any, form: GraphSignature) -> None:
        self._session, self._form = session, form

    def run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], past: Sequence[Floats] = ()
    ) -> tuple[Floats, list[Floats]]:
        """Logits of `ids` (rows, positions) behind `past`, and the cache; `mask` (rows, all positions), 0 at blanks."""
        cache = past or [self._empty(port, len(ids)) for port in self._form.cache]
        given: dict[str, NDArray[Any]] = dict(self.inputs(ids, mask))
        given |= {port.name: held for port, held in zip(self._form.cache, cache, strict=True)}
        logits, *present = self._session.run([port.name for port in self._form.outputs], given)
        return logits, present

    def inputs(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """What it takes but the cache, by name."""
        positions = (mask.cumsum(axis=1) - 1).clip(0)[:, -ids.shape[1] :]
        # Each second half is a text of its own, to encoders that tell texts of a pair apart.
        types = np.broadcast_to(np.arange(ids.shape[1]) * 2 // ids.shape[1], ids.shape).astype(np.int64)
        plain = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "token_type_ids": types}
        return {port.name: plain[port.name] for port in self._form.inputs if port.name in plain}

    @staticmethod
    def _empty(port: GraphValue, rows: int) -> Floats:
        sizes = {BATCH: rows, PAST: 0}
        shape = [sizes[size] if isinstance(size, str) else size for size in port.shape]
        return np.zeros(shape, np.float32)


class GreedyRun(NamedTuple):
    """How a model goes on from a prompt, taking the most likely token each time."""

    prefill: Floats  # (positions, vocabulary): logits of the prompt
    steps: list[Floats]  # (vocabulary,) each: logits from which each token was chosen; the first ends `prefill`
    tokens: list[int]  # chosen, the one that ends included


class LogitDifference:
    """The largest difference of logits met so far."""

    def __init__(self) -> None:
        self.apart, self.positions = 0.0, 0
        self.tie = 0.0  # units of a logit: two that differ by less may change places, as each may be off by half of it

    def add(self, found: Floats, expected: Floats) -> None:
        """Take in two of the shape (positions, classes)."""
        worst, largest = float(np.abs(found - expected).max()), max(float(np.abs(expected).max()), 1e-30)
        self.apart = max(self.apart, worst / largest if np.isfinite(worst) else np.inf)
        # No difference beyond what sums in another order come to excuses another choice.
        self.tie = max(self.tie, 2 * min(worst, MAX_DIFFERENCE * largest))
        self.positions += len(expected)

    def check(self, what: str) -> Check:
        """What it comes to."""
        said = f"{what}: {self.positions} positions within {self.apart:.1e} of the largest (at most {MAX_DIFFERENCE:g})"
        return Check("logits", self.apart <= MAX_DIFFERENCE, said, {"apart": self.apart, "positions": self.positions})


def _decoder(
    subject: ExportSource, model: PreTrainedModel, graph: OnnxSession, prompts: Sequence[Sequence[int]]
) -> Iterator[Check]:
    stops = eos_ids(subject)
    gap = LogitDifference()
    same, ties, wrong = 0, 0, ""
    courses = [_run_transformers(model, prompt, stops) for prompt in prompts]
    for prompt, course in zip(prompts, courses, strict=True):
        found = _run_onnx(graph, prompt, stops)
        gap.add(found.prefill, course.prefill)
        parted = next(
            (i for i, pair in enumerate(zip(course.tokens, found.tokens, strict=False)) if pair[0] != pair[1]), None
        )
        shared = min(len(course.tokens), len(found.tokens)) if parted is None else parted + 1
        for ours, theirs in zip(course.steps[1:shared], found.steps[1:shared], strict=True):
            gap.add(theirs[None], ours[None])
        if parted is None:
            same += 1
            continue
        logits = course.steps[parted]
        if logits[course.tokens[parted]] - logits[found.tokens[parted]] <= gap.tie:
            ties += 1
            continue
        left, right = (subject.tokenizer.decode(part[: parted + 1][-3:]) for part in (course.tokens, found.tokens))
        wrong = wrong or f"{left!r} became {right!r}, at token {parted + 1}"
    _compare_padded(model, graph, prompts, courses, stops, gap)
    yield gap.check("prompts, token after token with the cache, and two rows padded on the left")
    said = f"{same} of {len(prompts)} prompts are continued alike, token for token, and end alike"
    said += f"; {ties} part where two tokens are as likely" if ties else ""
    said += f"; first difference: {wrong}" if wrong else ""
    yield Check("text", not wrong, said, {"prompts": len(prompts), "same": same, "ties": ties})


@torch.no_grad()
def _run_transformers(model: PreTrainedModel, prompt: Sequence[int], stops: Sequence[int]) -> GreedyRun:
    """By transformers, alone in its batch and with a cache of its own choice."""
    found = model(input_ids=torch.tensor([list(prompt)]), use_cache=True)
    prefill: Floats = found.logits[0].numpy()
    steps, tokens = [prefill[-1]], [int(prefill[-1].argmax())]
    while tokens[-1] not in stops and len(tokens) < MAX_NEW_TOKENS:
        found = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=found.past_key_values, use_cache=True)
        steps.append(found.logits[0, -1].numpy())
        tokens.append(int(steps[-1].argmax()))
    return GreedyRun(prefill, steps, tokens)


def _run_onnx(graph: OnnxSession, prompt: Sequence[int], stops: Sequence[int]) -> GreedyRun:
    """By the graph."""
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
    courses: Sequence[GreedyRun],
    stops: Sequence[int],
    gap: LogitDifference,
) -> None:
    """The longest prompt and a shorter one as rows of a batch, and a token behind each, against each row alone."""
    longest, shortest = (choose(range(len(prompts)), key=lambda i: len(prompts[i])) for choose in (max, min))
    rows, alone = [prompts[longest], prompts[shortest]], [courses[longest], courses[shortest]]
    if len(rows[0]) == len(rows[1]):
        rows[1] = rows[1][: (len(rows[1]) + 1) // 2]
        alone[1] = _run_transformers(model, rows[1], stops)
    width = len(rows[0])
    ids = np.array([[0] * (width - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    logits, past = graph.run(ids, mask)
    chosen = np.array([[course.tokens[0]] for course in alone])
    after, _ = graph.run(chosen, np.concatenate([mask, np.ones_like(chosen)], axis=1), past)
    for row, course in enumerate(alone):
        gap.add(logits[row, width - len(rows[row]) :], course.prefill)
        if len(course.steps) > 1:  # else the first token ended it
            gap.add(after[row], course.steps[1][None])


def _classifier(
    subject: ExportSource, model: PreTrainedModel, graph: OnnxSession, prompts: Sequence[Sequence[int]]
) -> Iterator[Check]:
    kind = subject.labels.kind if subject.labels else "single"
    gap = LogitDifference()
    rows: list[tuple[Floats, Floats]] = []  # (labels,) of both
    for ids, mask in _batches(prompts, pad=int(getattr(model.config, "pad_token_id", None) or 0)):
        found, _ = graph.run(ids, mask)
        expected = _transformers_logits(model, graph.inputs(ids, mask))
        if subject.task == "token-cls":
            found, expected = found[mask == 1], expected[mask == 1]
        gap.add(found, expected)
        rows += list(zip(found, expected, strict=True))
    yield gap.check("rows one by one, and two of a batch padded on the right")
    if kind == "regression":
        return
    same, ties = 0, 0
    for theirs, ours in rows:
        if _labels(theirs, kind) == _labels(ours, kind):
            same += 1
        elif _margin(ours, theirs, kind) <= gap.tie:
            ties += 1
    said = f"{same} of {len(rows)} are labelled alike" + (f"; {ties} where two are as likely" if ties else "")
    yield Check("labels", same + ties == len(rows), said, {"rows": len(rows), "same": same, "ties": ties})


def _batches(prompts: Sequence[Sequence[int]], *, pad: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Ids and mask of each prompt alone, and of the longest with the start of itself behind it, as rows of a batch."""
    for prompt in prompts:
        yield np.array([prompt]), np.ones((1, len(prompt)), np.int64)
    longest = max(prompts, key=len)
    kept = (len(longest) + 1) // 2
    blank = len(longest) - kept
    yield (
        np.array([longest, [*longest[:kept], *[pad] * blank]]),
        np.array([[1] * len(longest), [1] * kept + [0] * blank]),
    )


@torch.no_grad()
def _transformers_logits(model: PreTrainedModel, given: Mapping[str, NDArray[np.int64]]) -> Floats:
    found: Floats = model(**{name: torch.from_numpy(values) for name, values in given.items()}).logits.numpy()
    return found


def _labels(logits: Floats, kind: str) -> list[int]:
    """Numbers of the labels that apply."""
    return [int(logits.argmax())] if kind == "single" else (logits > 0).nonzero()[0].tolist()


def _margin(ours: Floats, theirs: Floats, kind: str) -> float:
    """How far our logits are from choosing as theirs do."""
    if kind == "single":
        return float(ours.max() - ours[theirs.argmax()])
    return float(np.abs(ours[(ours > 0) != (theirs > 0)]).max())
