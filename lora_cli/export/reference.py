"""The original model in transformers, in fp32 on the CPU: the reference that an export is compared with."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from lora_cli.export.source import Continuation, ExportSource
from lora_cli.model.config_file import read_generation_config
from lora_cli.model.load_adapter import load_adapter
from lora_cli.run.read_file import RESTORE

CPU = torch.device("cpu")


def eos_ids(source: ExportSource) -> tuple[int, ...]:
    """Return the EOS token ids of the generation config, the config and the tokenizer, without repetitions."""
    ids: list[int] = []
    generation = read_generation_config(source.folder, hint=RESTORE).get("eos_token_id")
    for entry in (generation, source.config.get_text_config().eos_token_id, source.tokenizer.eos_token_id):
        ids += entry if isinstance(entry, list) else [entry] if entry is not None else []
    return tuple(dict.fromkeys(number for number in ids if 0 <= number < len(source.tokenizer)))


class ReferenceModel:
    """The source's model in transformers, with its adapter if it has one.

    Raises:
        LoraError: the model or the adapter cannot be loaded.
    """

    def __init__(self, source: ExportSource) -> None:
        model = source.base.load(CPU, dtype=torch.float32).model.eval()
        self._eos_ids = list(eos_ids(source))
        self._pad_id = source.tokenizer.pad_token_id
        self._model = model
        if source.adapter is not None:
            self._model = load_adapter(model, source.adapter, base=source.name).float().eval()

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int], *, last: int = 1) -> NDArray[np.float64]:
        """Return log-probabilities (nats, `[last, vocab]` fp64) of the token after each of the last `last` tokens."""
        logits = self._model(input_ids=torch.tensor([list(tokens)], device=CPU)).logits[0, -last:]
        logprobs: NDArray[np.float64] = logits.double().log_softmax(dim=-1).numpy()
        return logprobs

    @torch.inference_mode()
    def continue_greedily(self, tokens: Sequence[int], *, max_new_tokens: int) -> Continuation:
        """Continue `tokens` with the most likely token each time, until EOS or `max_new_tokens` tokens."""
        ids = torch.tensor([list(tokens)], device=CPU)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._eos_ids or None,
            pad_token_id=self._pad_id if self._pad_id is not None else 0,
        )
        output = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = output[0, len(tokens) :].tolist()
        stopped = bool(new) and new[-1] in self._eos_ids
        return Continuation(tuple(new[:-1] if stopped else new), stopped)
