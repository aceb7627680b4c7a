"""The chunked head and loss equal torch's cross-entropy, whatever a model does with its head."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lora_cli.data.collate import Batch, collate_packed, collate_padded
from lora_cli.model import head_loss, packed_attention
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.head_loss import CHUNK_TOKENS, ChunkedLinearCrossEntropy, chunk_tokens
from lora_cli.model.loss import LossFunction
from tests.model import families, zoo

# (dtype, tolerance of the loss, of the gradient); for bf16 the reference is computed in fp32 from the same values.
PRECISIONS = [(torch.float64, 1e-13, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 5e-3, 2e-2)]


@pytest.mark.parametrize(("dtype", "loss_tolerance", "grad_tolerance"), PRECISIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 5])
def test_chunked_loss_equals_cross_entropy(
    count: int, bias: bool, dtype: torch.dtype, loss_tolerance: float, grad_tolerance: float
):
    generator = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, weight, offset = draw(count, 16), draw(53, 16), draw(53) if bias else None
    targets = torch.randint(0, 53, (count,), generator=generator)
    mine = hidden.clone().requires_grad_()
    loss, correct = ChunkedLinearCrossEntropy.apply(mine, weight, offset, targets)
    (grad,) = torch.autograd.grad(3.0 * loss, mine)

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = hidden.to(exact).requires_grad_()
    logits = linear(theirs, weight.to(exact), None if offset is None else offset.to(exact))
    expected = cross_entropy(logits, targets, reduction="sum")
    (expected_grad,) = torch.autograd.grad(3.0 * expected, theirs)
    assert loss.dtype == exact
    assert grad.dtype == dtype
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=loss_tolerance)
    if count:
        assert zoo.relative(grad.to(exact), expected_grad) < grad_tolerance
    if dtype != torch.bfloat16:
        assert int(correct) == int((logits.argmax(-1) == targets).sum())
    with torch.no_grad():  # as in evaluation
        assert ChunkedLinearCrossEntropy.apply(hidden, weight, offset, targets)[0] == loss


def test_extreme_logits_stay_finite_and_exact():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([0, 0])
    loss, correct = ChunkedLinearCrossEntropy.apply(hidden, weight, None, targets)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert (float(loss.detach()), int(correct)) == (600.0, 1)
    assert torch.equal(grad, torch.tensor([[0.0], [-2.0]]))


PLAIN = {
    "llama": True,
    "llama-tied": True,
    "qwen2": True,
    "gpt2": True,
    "gpt-neox": True,
    "deepseek3": True,
    "gemma3": True,
    "gemma2": False,  # caps its logits
    "granite": False,  # divides them
    "cohere": False,  # multiplies them
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", PLAIN)
def test_the_loss_equals_that_of_transformers(family: str, packing: bool):
    model = zoo.make(family)
    rows = zoo.rows_of([12, 5, 31, 8])
    all_rows = [rows[i] for i in range(len(rows))]
    expected = sum(_library_loss(model, row) for row in all_rows)
    peft_model = zoo.adapted(model)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # because the expected loss is that of the base
    capped = family == "gemma2"
    model.set_attn_implementation("eager" if capped else packed_attention.PACKED_ATTENTION if packing else "sdpa")
    loss_fn = LossFunction(peft_model)
    assert loss_fn.head is not None
    assert loss_fn.head.plain == PLAIN[family]
    result = loss_fn((collate_packed if packing else collate_padded)(all_rows, range(4), 0))
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert result.tokens == sum(int((row.labels[1:] != -100).sum()) for row in all_rows)
    assert result.loss.requires_grad


def _library_loss(model: torch.nn.Module, row: zoo.Row) -> float:
    """Return the loss that transformers computes from `labels`, in nats, summed over the row."""
    ids, labels = (torch.tensor(x[None].astype("int64")) for x in (row.input_ids, row.labels))
    out = model(input_ids=ids, labels=labels)
    return float(out.loss) * int((row.labels[1:] != -100).sum())


HEADS = {
    "cap": ("gemma2", {}),
    "division": ("granite", {}),
    "factor": ("cohere", {}),
    "lora": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "lora, tied": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "lora and a cap": ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
    "trained": ("llama", {"modules_to_save": ["lm_head"]}),
    "trained tokens of a tied head": ("llama-tied", {"trainable_tokens": ["ab", "abcde"]}),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_chunked_with_the_loss_and_gradients_of_all_logits_at_once(
    head: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
):
    family, options = HEADS[head]
    model = zoo.adapted(zoo.make(family), **options)
    upcast_trainable_params(model)
    rows = zoo.rows_of([12, 5, 31, 8])
    batch = collate_padded([rows[i] for i in range(4)], range(4), 0)
    loss_fn = LossFunction(model, label_smoothing=smoothing)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logits = loss_fn.logits(batch)
    expected = cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=smoothing)
    gradients = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)

    monkeypatch.setattr(head_loss, "CHUNK_TOKENS", 7)
    sizes: list[int] = []
    assert loss_fn.head is not None
    assert not loss_fn.head.plain
    handle = loss_fn.head.layer.register_forward_hook(lambda _, args, out: sizes.append(out.shape[0]))
    result = loss_fn(batch)
    result.loss.backward()
    handle.remove()
    assert max(sizes) == 7
    assert sum(sizes) == result.tokens > 14
    assert float(result.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert int(result.correct) == int((logits.argmax(-1) == batch.targets).sum())
    for name, gradient in zip(trained, gradients, strict=True):
        found = trained[name].grad
        assert (found is None) == (gradient is None), name
        if gradient is not None:
            assert zoo.relative(found, gradient) < 1e-4, name
    losses, correct = loss_fn.per_token(batch)
    assert float(losses.sum()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert int(correct.sum()) == int(result.correct)


@pytest.mark.parametrize("head", ["lora", "trained"])
def test_an_evaluation_computes_no_gradient_of_a_trained_head(head: str, monkeypatch: pytest.MonkeyPatch):
    family, options = HEADS[head]
    loss_fn = LossFunction(zoo.adapted(zoo.make(family), **options))
    rows = zoo.rows_of([12, 31])
    batch = collate_padded([rows[0], rows[1]], range(2), 0)
    expected = loss_fn(batch).loss.item()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        assert loss_fn(batch).loss.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(AssertionError, match="a gradient"):
        loss_fn(batch)


def test_only_a_frozen_linear_head_is_plain():
    def head_of(**options: Any) -> Any:
        return LossFunction(zoo.adapted(zoo.make("llama"), **options)).head

    assert head_of().plain
    assert not head_of(target_modules=["q_proj", "lm_head"]).plain


def test_a_model_that_does_something_unknown_computes_its_own_logits(monkeypatch: pytest.MonkeyPatch):
    model = zoo.make("gemma2")
    monkeypatch.setattr(head_loss, "LOGIT_KEYS", {})
    loss_fn = LossFunction(model)
    assert loss_fn.head is None
    rows = zoo.rows_of([12, 31])
    batch = collate_padded([rows[0], rows[1]], range(2), 0)
    monkeypatch.undo()
    assert loss_fn(batch).loss.item() == pytest.approx(LossFunction(model)(batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_creating_a_loss_function_keeps_the_training_mode(training: bool):
    model = zoo.adapted(zoo.make("llama")).train(training)
    assert LossFunction(model).base.training is training


def test_the_loss_includes_the_active_adapter():
    model = zoo.adapted(zoo.make("llama"))
    rows = zoo.rows_of([20])
    batch = collate_padded([rows[0]], [0], 0)
    loss_fn = LossFunction(model)
    with model.disable_adapter():
        base = float(loss_fn(batch).loss.detach())
    assert base == pytest.approx(float(LossFunction(zoo.make("llama"))(batch).loss), rel=1e-6)
    assert float(loss_fn(batch).loss.detach()) != pytest.approx(base, rel=1e-3)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_a_head_computes_logits_only_at_labels(family: str, packing: bool):
    model = zoo.make(family, attention="eager")
    loss_fn = LossFunction(model)
    rows = zoo.rows_of([12, 5, 31, 8])
    for i in range(len(rows)):
        rows[i].labels[:-2] = -100
        rows[i].labels[-2:] = rows[i].input_ids[-2:]
    batch = (collate_packed if packing else collate_padded)([rows[i] for i in range(len(rows))], range(4), 0)
    positions: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: positions.append(out.numel() // 97))
    result = loss_fn(batch)
    assert result.tokens == 8
    assert positions == [8]
    total, _ = zoo.loss_row_by_row(model, rows)
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_label_smoothing_of_the_chunked_loss_equals_torch(smoothing: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, 50, (300,), generator=generator)
    loss, correct = ChunkedLinearCrossEntropy.apply(hidden, weight, None, targets, smoothing)
    (grad,) = torch.autograd.grad(loss, hidden)
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert zoo.relative(grad, expected_grad) < tolerance
    assert int(correct) == int((logits.argmax(1) == targets).sum())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_label_smoothing_is_the_same_for_both_kinds_of_head(family: str):
    """Llama's head is plain, and has a formula for its gradient; Gemma 2's caps its logits."""
    model = zoo.adapted(zoo.make(family))
    rows = zoo.rows_of([12, 31])
    batch = collate_padded([rows[0], rows[1]], range(2), 0)
    loss_fn = LossFunction(model, label_smoothing=0.2)
    assert loss_fn.head is not None
    assert loss_fn.head.plain is (family == "llama")
    logits = loss_fn.logits(batch).double()
    expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=0.2)
    assert loss_fn(batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss_fn(batch).loss.item() != pytest.approx(LossFunction(model)(batch).loss.item(), rel=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_neftune_noise_is_uniform_and_scaled_by_the_row_length(packing: bool):
    """For a row of L tokens, |noise| < alpha/sqrt(L·d), with a variance of a third of the square of that bound.

    In evaluation no noise is added.
    """
    alpha, rows = 5.0, zoo.rows_of([6, 30, 11])
    batch = (collate_packed if packing else collate_padded)([rows[i] for i in range(3)], range(3), 0)
    model = zoo.adapted(zoo.make("llama", attention=packed_attention.PACKED_ATTENTION if packing else "sdpa"))
    torch.manual_seed(0)
    embedded: list[torch.Tensor] = []
    plain = model.get_base_model().get_input_embeddings()(batch.input_ids)
    loss_fn = LossFunction(model, neftune_alpha=alpha)
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda _, args, out: embedded.append(out))
    without_noise = LossFunction(model)
    model.eval()
    assert without_noise(batch).loss == loss_fn(batch).loss
    assert torch.equal(embedded[-1], plain)
    model.train()
    assert loss_fn(batch).loss != loss_fn(batch).loss
    noise = embedded[-1] - plain
    ends = accumulate(batch.lengths)
    for number, (end, length) in enumerate(zip(ends, batch.lengths, strict=True)):
        row = noise[0, end - length : end] if packing else noise[number, :length]
        bound = alpha / (length * row.shape[-1]) ** 0.5
        assert 0.95 * bound < float(row.abs().max()) <= bound * (1 + 1e-5)
        assert float(row.var()) == pytest.approx(bound**2 / 3, rel=0.15)
        assert abs(float(row.mean())) < bound / 5


def test_close_removes_the_neftune_noise():
    model = zoo.adapted(zoo.make("llama")).train()
    rows = zoo.rows_of([12, 5])
    batch = collate_padded([rows[0], rows[1]], range(2), 0)
    loss_fn = LossFunction(model, neftune_alpha=5.0)
    assert loss_fn(batch).loss != LossFunction(model)(batch).loss
    loss_fn.close()
    assert not model.get_base_model().get_input_embeddings()._forward_hooks
    assert loss_fn(batch).loss == LossFunction(model)(batch).loss


def test_neftune_noise_is_added_in_classifiers_too(tmp_path: Path):
    family = families.FAMILIES["bert"]
    model = families.load(family, families.write(family, tmp_path / "bert")).model
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    positions = torch.arange(4).repeat(2, 1)
    batch = Batch(ids, positions, ids > 0, (4, 2), torch.arange(2), torch.tensor([0, 1]), (0, 1))
    loss_fn = LossFunction(model, task="seq-cls", neftune_alpha=5.0)
    loss_in_eval = loss_fn(batch).loss
    assert loss_fn(batch).loss == loss_in_eval
    model.train()
    for module in model.modules():  # without BERT's own dropout, only the noise changes the loss
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert loss_fn(batch).loss != loss_in_eval


@pytest.mark.parametrize(
    ("vocabulary", "device", "expected"),
    [(128_256, "cpu", 256), (128_256, "cuda", 523), (32_000, "cuda", 2097), (10**7, "cuda", 256)],
)
def test_the_chunk_of_tokens_follows_vocabulary_and_device(vocabulary: int, device: str, expected: int):
    assert chunk_tokens(vocabulary, torch.device(device)) == expected
