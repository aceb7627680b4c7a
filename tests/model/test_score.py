"""The fused head and loss are torch's cross-entropy; heads that do more than multiply are left to the model."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lora_cli.data.batches import join_packed, join_padded
from lora_cli.model import attention
from lora_cli.model.score import CHUNK, HeadLoss, Scorer
from tests.model import zoo

# (dtype, tolerance of the loss, of the gradient); for bf16 the reference is made in fp32 from the same numbers.
PRECISIONS = [(torch.float64, 1e-13, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 5e-3, 2e-2)]


@pytest.mark.parametrize(("dtype", "loss_off", "grad_off"), PRECISIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_head_loss_is_cross_entropy(count: int, bias: bool, dtype: torch.dtype, loss_off: float, grad_off: float):
    generator = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, weight, offset = draw(count, 16), draw(53, 16), draw(53) if bias else None
    targets = torch.randint(0, 53, (count,), generator=generator)
    mine = hidden.clone().requires_grad_()
    loss, correct = HeadLoss.apply(mine, weight, offset, targets)
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
        assert HeadLoss.apply(hidden, weight, offset, targets)[0] == loss


def test_extreme_logits_stay_finite_and_exact():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([0, 0])
    loss, correct = HeadLoss.apply(hidden, weight, None, targets)
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
    model.set_attn_implementation("eager" if capped else attention.NAME if packing else "sdpa")
    scorer = Scorer(peft_model)
    assert scorer.plain_head == PLAIN[family]
    score = scorer((join_packed if packing else join_padded)(chosen, range(4), 0))
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
    assert Scorer(zoo.adapted(model)).plain_head
    assert not Scorer(zoo.adapted(zoo.make("llama"), target_modules=["q_proj", "lm_head"])).plain_head


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_the_head_leaves_the_mode_alone(training: bool):
    model = zoo.adapted(zoo.make("llama")).train(training)
    assert Scorer(model).base.training is training


def test_the_active_adapter_counts():
    model = zoo.adapted(zoo.make("llama"))
    rows = zoo.rows_of([20])
    batch = join_padded([rows[0]], [0], 0)
    scorer = Scorer(model)
    with model.disable_adapter():
        base = float(scorer(batch).loss.detach())
    assert base == pytest.approx(float(Scorer(zoo.make("llama"))(batch).loss), rel=1e-6)
    assert float(scorer(batch).loss.detach()) != pytest.approx(base, rel=1e-3)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_no_head_computes_logits_where_there_is_no_label(family: str, packing: bool):
    model = zoo.make(family, attention="eager")
    scorer = Scorer(model)
    rows = zoo.rows_of([12, 5, 31, 8])
    for i in range(len(rows)):
        rows[i].labels[:-2] = -100
        rows[i].labels[-2:] = rows[i].input_ids[-2:]
    batch = (join_packed if packing else join_padded)([rows[i] for i in range(len(rows))], range(4), 0)
    multiplied: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: multiplied.append(out.numel() // 97))
    score = scorer(batch)
    assert score.tokens == 8
    # Padded, the head takes whole columns: at most four rows for each label.
    assert multiplied == [8] or (not packing and multiplied[0] <= 4 * 8)
    total, _ = zoo.loss_row_by_row(model, rows)
    assert score.loss.item() == pytest.approx(total.item(), rel=1e-5)
