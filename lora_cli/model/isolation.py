"""Choose the attention for packed rows, and prove on the model itself that rows do not see each other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from lora_cli.data.batches import Batch
from lora_cli.errors import LoraError
from lora_cli.model import attention
from lora_cli.model.score import Scorer

# Largest difference of logits, relative to their size, that rounding explains. A row that sees another one is
# off by a tenth and more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Proof(NamedTuple):
    """What was chosen and what was measured, on two rows packed, changed and apart."""

    attention: str
    leak: float  # change of one row's logits when the other row is changed, relative to the largest logit
    difference: float  # packed against separate, likewise


def candidates(wanted: str, *, packing: bool, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Attention implementations to try, best first, by their names in transformers."""
    if wanted != "auto":
        return [wanted]
    if device.type == "cuda":
        # flash-attention takes row boundaries and half precision; without it, sdpa masks rows from each other.
        # Neither was ever run here: there is no GPU on the machines this is developed on.
        flash = ["flash_attention_2"] if is_flash_attn_2_available() and dtype != torch.float32 else []
        return [*flash, "sdpa", "eager"]
    return [attention.NAME, "sdpa", "eager"] if packing else ["sdpa", "eager"]


def settle(model: PreTrainedModel, wanted: str, *, packing: bool) -> Proof | None:
    """Set the first attention that works on `model`, and with packing, that keeps rows apart; None without packing.

    Raises:
        LoraError: packing was asked for, and no attention keeps rows apart in this model.
    """
    device, dtype = model.device, model.dtype
    tried = []
    for name in candidates(wanted, packing=packing, device=device, dtype=dtype):
        try:
            model.set_attn_implementation(name)
            if not packing:
                return None
            proof = _measure(model, name)
        except (NotImplementedError, ValueError, ImportError) as reason:
            tried.append(f"{name} ({str(reason).splitlines()[0]})")
            continue
        if max(proof.leak, proof.difference) <= TOLERANCE[dtype]:
            return proof
        tried.append(
            f"{name} (rows change each other's logits by {proof.leak:.1%}, packed is off by {proof.difference:.1%})"
        )
    if packing:
        raise LoraError(
            f"data.packing: {type(model).__name__} does not keep packed rows apart; tried {'; '.join(tried)}",
            hint="set data.packing: false",
        )
    raise LoraError(f"model.attention: none works here; tried {'; '.join(tried)}", hint="set model.attention: eager")


@torch.no_grad()
def _measure(model: PreTrainedModel, name: str) -> Proof:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, second = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (7, 7, 11))
    training = model.training
    model.eval()
    scorer = Scorer(model)

    def logits(rows: Sequence[Tensor]) -> Tensor:
        lengths = tuple(len(row) for row in rows)
        positions = torch.cat([torch.arange(n) for n in lengths])
        nothing = torch.empty(0, dtype=torch.int64)
        batch = Batch(torch.cat(list(rows))[None], positions[None], None, lengths, nothing, nothing, ())
        result: Tensor = model(**scorer.inputs(batch)).logits[0].double()
        return result

    packed, changed, apart = logits([first, second]), logits([other, second]), logits([second])
    model.train(training)
    size = apart.abs().max().clamp_min(1e-12)
    leak = (packed[len(first) :] - changed[len(first) :]).abs().max() / size
    difference = (packed[len(first) :] - apart).abs().max() / size
    return Proof(name, float(leak), float(difference))
