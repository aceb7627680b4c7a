"""The original in transformers, in fp32: what an export is held against."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig
from transformers import GenerationConfig

from lora_cli.export.source import Continuation, ExportSource
from lora_cli.model import base_model
from lora_cli.model.load_adapter import load_adapter

CPU = torch.device("cpu")


def eos_ids(subject: ExportSource) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: the generation config's, and the tokenizer's."""
    found: list[int] = []
    file = subject.model / "generation_config.json"
    told = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    for entry in (told, subject.config.get_text_config().eos_token_id, subject.tokenizer.eos_token_id):
        found += entry if isinstance(entry, list) else [entry] if entry is not None else []
    return tuple(dict.fromkeys(number for number in found if 0 <= number < len(subject.tokenizer)))


class ReferenceModel:
    """The model, with its adapter where the subject has one."""

    def __init__(self, subject: ExportSource) -> None:
        options: dict[str, object] = {"trust_remote_code": subject.trust_remote_code}
        source = base_model.ModelSource(str(subject.model), options)
        model = base_model.load_base(
            source, dtype=torch.float32, device=CPU, task=subject.task, labels=subject.labels
        ).model.eval()
        self._ends = list(eos_ids(subject))
        self._pad = subject.tokenizer.pad_token_id
        self._model = model
        if subject.adapter is not None:
            config = PeftConfig.from_pretrained(str(subject.adapter))
            self._model = load_adapter(model, subject.adapter, base=subject.name, config=config).float().eval()

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int], *, last: int = 1) -> NDArray[np.float64]:
        """Log-probabilities (last, vocabulary) of the tokens after each of the last `last` of `tokens`, in nats."""
        logits = self._model(input_ids=torch.tensor([list(tokens)], device=CPU)).logits[0, -last:]
        found: NDArray[np.float64] = logits.double().log_softmax(dim=-1).numpy()
        return found

    @torch.inference_mode()
    def continue_greedily(self, tokens: Sequence[int], *, longest: int) -> Continuation:
        """The most likely token after `tokens`, again and again, up to `longest` or one that ends an answer."""
        ids = torch.tensor([list(tokens)], device=CPU)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad if self._pad is not None else 0,
        )
        made = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, len(tokens) :
        ].tolist()
        stopped = bool(made) and made[-1] in self._ends
        return Continuation(tuple(made[:-1] if stopped else made), stopped)
