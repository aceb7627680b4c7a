"""Steps of TRL's SFTTrainer on given batches, one at a time, for the measurements; only imported if TRL is there."""

from collections.abc import Iterator
from queue import Queue
from threading import Thread
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_cli.data.batches import BatchPlan
from tests.gpu.library_inputs import library_inputs
from tests.inputs.tiny_tokenizers import CHATML, build


class _Steps(TrainerCallback):
    """Hands the loss of each step over, and waits until the next step is asked for."""

    def __init__(self) -> None:
        self.losses: Queue[float | BaseException | None] = Queue()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
        """Hand over the loss; the last log of a run has none."""
        if logs and "loss" in logs:
            self.losses.put(float(logs["loss"]))
            self.losses.join()


class _OwnBatches(SFTTrainer):
    """SFTTrainer on batches that are made already, in their order."""

    batches: list[dict[str, Tensor]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches."""
        made: Any = self.batches  # a list is a dataset, which torch's types do not say
        return DataLoader(made, batch_size=None)


def train_with_trl(
    model: PeftModel, plan: BatchPlan, *, steps: int, dtype: torch.dtype, folder: str, learning_rate: float
) -> Iterator[tuple[int, int, float]]:
    """Yield real tokens, supervised tokens and loss of each step, which is taken when it is asked for.

    Args:
        model: with its adapter.
        plan: of padded batches, one a step.
        steps: to take.
        dtype: of autocast.
        folder: for what TRL writes.
        learning_rate: of AdamW.
    """
    batches = [batch for number in range(steps) for _, batch in plan.batches_of_step(number)]
    settings = SFTConfig(
        output_dir=folder, max_steps=steps, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=model.device.type == "cpu",
        learning_rate=learning_rate, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    handed = _Steps()
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})  # never used: the batches are given
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    tokenizer.pad_token = "<|endoftext|>"
    trainer = _OwnBatches(model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[handed])
    trainer.batches = [library_inputs(batch) for batch in batches]

    def run() -> None:
        failed: BaseException | None = None
        try:
            trainer.train()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            failed = error  # raised again by the reader, which may count it as out of memory
        handed.losses.put(failed)

    Thread(target=run, daemon=True).start()
    for batch in batches:
        loss = handed.losses.get()
        if isinstance(loss, BaseException):
            raise loss
        assert loss is not None
        yield batch.tokens, len(batch.targets), loss
        handed.losses.task_done()
    handed.losses.get()  # the end of the thread, before its folder is removed
