"""The fused head and loss are torch's cross-entropy; heads that do more than multiply are left to the model."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lora_cli.data.collate import Batch, collate_packed, collate_padded
from lora_cli.model import packed_attention
from lora_cli.model.loss import CHUNK_TOKENS, ChunkedLinearCrossEntropy, LossFunction
from tests.model import families, zoo

# (dtype, tolerance of the loss, of the gradient); for bf16 the reference is made in fp32 from the same numbers.
PRECISIONS = [(torch.float64, 1e-13, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 5e-3, 2e-2)]


@pytest.mark.parametrize(("dtype", "loss_off", "grad_off"), PRECISIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 5])
def test_head_loss_is_cross_entropy(count: int, bias: bool, dtype: torch.dtype, loss_off: float, grad_off: float):
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
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=loss_off)
    if count:
        assert zoo.relative(grad.to(exact), expected_grad) < grad_off
    if dtype != torch.bfloat16:
        assert int(correct) == int((logits.argmax(-1) == targets).sum())
    with torch.no_grad():  # as evaluation calls it
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
def test_the_loss_is_transformers_own(family: str, packing: bool):
    model = zoo.make(family)
    rows = zoo.rows_of([12, 5, 31, 8])
    chosen = [rows[i] for i in range(len(rows))]
    expected = sum(_library_loss(model, row) for row in chosen)
    peft_model = zoo.adapted(model)  # B is random: undo it, the library's loss was the base's
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    capped = family == "gemma2"
    model.set_attn_implementation("eager" if capped else packed_attention.PACKED_ATTENTION if packing else "sdpa")
    loss_fn = LossFunction(peft_model)
    assert loss_fn.plain_head == PLAIN[family]
    score = loss_fn((collate_packed if packing else collate_padded)(chosen, range(4), 0))
    assert float(score.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert score.tokens == sum(int((row.labels[1:] != -100).sum()) for row in chosen)
    assert score.loss.requires_grad


def _library_loss(model: torch.nn.Module, row: zoo.Row) -> float:
    """The loss that transformers computes from `labels`, summed over the row."""
    ids, labels = (torch.tensor(x[None].astype("int64")) for x in (row.input_ids, row.labels))
    out = model(input_ids=ids, labels=labels)
    return float(out.loss) * int((row.labels[1:] != -100).sum())


def test_a_head_with_an_adapter_is_not_plain():
    model = zoo.make("llama")
    assert LossFunction(zoo.adapted(model)).plain_head
    assert not LossFunction(zoo.adapted(zoo.make("llama"), target_modules=["q_proj", "lm_head"])).plain_head


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_the_head_leaves_the_mode_alone(training: bool):
    model = zoo.adapted(zoo.make("llama")).train(training)
    assert LossFunction(model).base.training is training


def test_the_active_adapter_counts():
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
def test_no_head_computes_logits_where_there_is_no_label(family: str, packing: bool):
    model = zoo.make(family, attention="eager")
    loss_fn = LossFunction(model)
    rows = zoo.rows_of([12, 5, 31, 8])
    for i in range(len(rows)):
        rows[i].labels[:-2] = -100
        rows[i].labels[-2:] = rows[i].input_ids[-2:]
    batch = (collate_packed if packing else collate_padded)([rows[i] for i in range(len(rows))], range(4), 0)
    multiplied: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: multiplied.append(out.numel() // 97))
    score = loss_fn(batch)
    assert score.tokens == 8
    # Padded, the head takes whole columns: at most four rows for each label.
    assert multiplied == [8] or (not packing and multiplied[0] <= 4 * 8)
    total, _ = zoo.loss_row_by_row(model, rows)
    assert score.loss.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_loss_smooths_labels_as_torch_does(smoothing: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, 50, (300,), generator=generator)
    loss, correct = ChunkedLinearCrossEntropy.apply(hidden, weight, None, targets, smoothing)
    (grad,) = torch.autograd.grad(loss, hidden)
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (its_grad,) = torch.autograd.grad(expected, hidden)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    assert zoo.relative(grad, its_grad) < close
    assert int(correct) == int((logits.argmax(1) == targets).sum())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_smoothing_is_the_same_through_either_head(family: str):
    """Llama's head is plain, Gemma 2's caps its logits: the one goes by HeadLoss, the other by torch."""
    model = zoo.adapted(zoo.make(family))
    rows = zoo.rows_of([12, 31])
    batch = collate_padded([rows[0], rows[1]], range(2), 0)
    smooth = LossFunction(model, label_smoothing=0.2)
    assert smooth.plain_head is (family == "llama")
    logits = smooth.logits(batch).double()
    expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=0.2)
    assert smooth(batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert smooth(batch).loss.item() != pytest.approx(LossFunction(model)(batch).loss.item(), rel=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_neftune_noise_is_uniform_of_each_rows_own_size(packing: bool):
    """|noise| < alpha/sqrt(L·d) of a row of L tokens, its variance a third of that squared; none in evaluation."""
    alpha, rows = 5.0, zoo.rows_of([6, 30, 11])
    batch = (collate_packed if packing else collate_padded)([rows[i] for i in range(3)], range(3), 0)
    model = zoo.adapted(zoo.make("llama", attention=packed_attention.PACKED_ATTENTION if packing else "sdpa"))
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []
    plain = model.get_base_model().get_input_embeddings()(batch.input_ids)
    loss_fn = LossFunction(model, neftune_alpha=alpha)
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda _, given, out: seen.append(out))
    before = LossFunction(model)
    model.eval()
    assert before(batch).loss == loss_fn(batch).loss
    assert torch.equal(seen[-1], plain)
    model.train()
    assert loss_fn(batch).loss != loss_fn(batch).loss
    noise = seen[-1] - plain
    ends = accumulate(batch.lengths)
    for number, (end, length) in enumerate(zip(ends, batch.lengths, strict=True)):
        row = noise[0, end - length : end] if packing else noise[number, :length]
        most = alpha / (length * row.shape[-1]) ** 0.5
        assert 0.95 * most < float(row.abs().max()) <= most * (1 + 1e-5)
        assert float(row.var()) == pytest.approx(most**2 / 3, rel=0.15)
        assert abs(float(row.mean())) < most / 5


def test_classifiers_take_noise_too(tmp_path: Path):
    family = families.FAMILIES["bert"]
    model = families.load(family, families.write(family, tmp_path / "bert")).model
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    positions = torch.arange(4).repeat(2, 1)
    batch = Batch(ids, positions, ids > 0, (4, 2), torch.arange(2), torch.tensor([0, 1]), (0, 1))
    loss_fn = LossFunction(model, task="seq-cls", neftune_alpha=5.0)
    quiet = loss_fn(batch).loss
    assert loss_fn(batch).loss == quiet
    model.train()
    for module in model.modules():  # BERT's own dropout is not what is looked at
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert loss_fn(batch).loss != quiet
