"""Train on the same rows with `lora train` and with plain transformers + PEFT, and compare losses or speed.

    python scripts/compare_with_peft.py DATA.json            # losses of each step in fp32: about 3 minutes on 2 cores
    python scripts/compare_with_peft.py DATA.json --speed    # real tokens per second, each as in normal use

DATA.json is an alpaca file: a list of {instruction, input, output}. Without --speed, exits with 1 if the numbers of
trainable parameters or of tokens differ, or if a step's losses differ by more than 2%.
"""

# ruff: noqa: E402 - the environment variables must be set before the libraries are imported
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lora_cli.run.library_warnings import silence_library_warnings

silence_library_warnings()

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from lora_cli.data.batches import BatchPlan
from lora_cli.data.encoded_rows import Row
from lora_cli.model.gguf_base import unpack_gguf
from lora_cli.run.cache_folder import cache_folder

transformers_logging.disable_progress_bar()

MODEL = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED, LEARNING_RATE, RANK, ALPHA = 42, 2e-4, 16, 32
MAX_DIFFERENCE = 0.02  # relative difference of one step's losses
TOKENS = 1024  # --speed: tokens in a packed batch of lora; a padded batch of PEFT has about as many real tokens
EncodedRow = tuple[list[int], list[int]]  # input_ids and labels of one row


class Step(NamedTuple):
    """One optimizer step."""

    loss: float  # nats per supervised token
    tokens: int  # real ones, without padding
    seconds: float


class Run(NamedTuple):
    """One training run, of lora or of PEFT."""

    trainable: int  # parameters
    steps: list[Step]


# --- plain transformers + PEFT, as in its documentation -----------------------------------------------------------


def encode(tokenizer: Any, row: dict[str, str]) -> EncodedRow:
    """Tokenize a row with the chat template; only the answer, with its end-of-turn token, carries loss."""
    question = {"role": "user", "content": "\n".join(part for part in (row["instruction"], row.get("input")) if part)}
    answer = {"role": "assistant", "content": row["output"]}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template([question, answer], return_dict=True)["input_ids"]
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids, [-100] * len(prompt) + ids[len(prompt) : end] + [-100] * (len(ids) - end)


def pad(rows: Sequence[EncodedRow], pad_id: int) -> dict[str, torch.Tensor]:
    """Return a batch of `rows`, padded on the right: int64 tensors `[batch, seq]`."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


def train_with_peft(
    folder: Path, rows: list[EncodedRow], batches: list[list[int]], *, bf16: bool, dropout: float
) -> Run:
    """Train with transformers and PEFT, one optimizer step for each of `batches`, which are indices into `rows`."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    pad_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(batches))
    model.train()
    steps = []
    for batch in batches:
        start = time.perf_counter()
        inputs = pad([rows[i] for i in batch], pad_id)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.append(Step(loss.item(), int(inputs["attention_mask"].sum()), time.perf_counter() - start))
    return Run(sum(p.numel() for p in trainable), steps)


# --- lora train ---------------------------------------------------------------------------------------------------


def train_with_lora(model: Path, data: Path, output: Path, **overrides: Any) -> Run:
    """Write a recipe, run `lora train` with it, and read the metrics of the run."""
    recipe = {
        "model": {"path": str(model), "dtype": overrides.pop("dtype")},
        "adapter": {
            "rank": RANK,
            "alpha": ALPHA,
            "target_modules": "all-linear",
            "dropout": overrides.pop("dropout"),
        },
        "data": {"train": str(data), "format": "alpaca", "eval": None, "packing": overrides.pop("packing")},
        "training": {"learning_rate": LEARNING_RATE, "warmup": 0, "seed": SEED, "save_every": None, **overrides},
        "output": str(output),
    }
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
    process = subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", str(file)], capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"lora train ended with exit code {process.returncode}:\n{process.stderr}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((output / "manifest.json").read_text())
    steps = [Step(line["loss"], line["tokens"], line["seconds"]) for line in lines if "loss" in line]
    return Run(manifest["trainable_parameters"], steps)


# --- the two comparisons ------------------------------------------------------------------------------------------


class EncodedRows:
    """The rows encoded for PEFT, with the interface that `BatchPlan` expects."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Row:
        ids, labels = (np.array(part, dtype=np.int32) for part in self.rows[i])
        return Row(ids, labels, f"row {i}")


def compare_losses(arguments: argparse.Namespace, selected: "Selection", scratch: Path) -> bool:
    """Print both losses of each step; return whether they agree."""
    plan = BatchPlan(EncodedRows(selected.rows), packing=False, size=arguments.rows, batches_per_step=1, seed=SEED)
    info("lora train ...")
    lora_run = train_with_lora(
        arguments.model,
        selected.file,
        scratch / "run",
        dtype="float32",
        dropout=0.0,
        packing=False,
        batch_size=arguments.rows,
        epochs=1,
    )
    info("transformers + PEFT ...")
    folder = unpack_gguf(arguments.model, dtype=torch.float32, cache=cache_folder(), info=info)
    peft_run = train_with_peft(folder, selected.rows, plan.epoch(0), bf16=False, dropout=0.0)

    print(f"\ntrainable parameters   lora {lora_run.trainable:,}   PEFT {peft_run.trainable:,}")
    print("\nstep   tokens    loss: lora     loss: PEFT    difference")
    differences = []
    for number, (lora_step, peft_step) in enumerate(zip(lora_run.steps, peft_run.steps, strict=True), 1):
        differences.append(abs(lora_step.loss / peft_step.loss - 1))
        tokens = f"{lora_step.tokens:,}"
        if lora_step.tokens != peft_step.tokens:
            tokens += f"/{peft_step.tokens:,}"
        print(f"{number:4} {tokens:>8} {lora_step.loss:13.6f} {peft_step.loss:14.6f}    {differences[-1]:10.1e}")
    print(f"\nlargest difference   {max(differences):.1e}   (at most {MAX_DIFFERENCE:.0%} allowed)")
    seconds = [median(step.seconds for step in run.steps[1:] or run.steps) for run in (lora_run, peft_run)]
    print(
        f"seconds per step     lora {seconds[0]:.2f}   PEFT {seconds[1]:.2f}   (medians, fp32, the same padded batches)"
    )
    same_count = lora_run.trainable == peft_run.trainable
    same_rows = all(a.tokens == b.tokens for a, b in zip(lora_run.steps, peft_run.steps, strict=True))
    same_losses = max(differences) <= MAX_DIFFERENCE
    agree = same_count and same_rows and same_losses
    print("equal" if agree else f"DIFFERENT: parameters {same_count}, tokens {same_rows}, losses {same_losses}")
    return agree


def compare_speed(arguments: argparse.Namespace, selected: "Selection", scratch: Path) -> None:
    """Train in turn with lora and PEFT, each as in normal use, and print real tokens per second."""
    steps = arguments.steps
    lengths = [len(ids) for ids, _ in selected.rows]
    size = max(1, round(TOKENS / (sum(lengths) / len(lengths))))
    order = np.random.default_rng(SEED).permutation(len(lengths)).tolist()
    batches = [order[start : start + size] for start in range(0, size * steps, size)]
    folder = unpack_gguf(arguments.model, dtype=torch.bfloat16, cache=cache_folder(), info=info)
    print(
        f"\nlora: rows packed into {TOKENS} tokens; PEFT: {size} rows per batch, padded; bf16, dropout 0.05, all-linear"
    )
    print(f"{steps} steps in each round; the first is not counted\n")
    print("round    lora tokens/s    PEFT tokens/s    ratio")
    rounds = []
    for number in range(1, arguments.rounds + 1):
        lora_run = train_with_lora(
            arguments.model,
            selected.file,
            scratch / f"run-{number}",
            dtype="bfloat16",
            dropout=0.05,
            packing=True,
            tokens_per_batch=TOKENS,
            max_steps=steps,
        )
        peft_run = train_with_peft(folder, selected.rows, batches, bf16=True, dropout=0.05)
        rounds.append((_rate(lora_run), _rate(peft_run)))
        print(
            f"{number:5} {rounds[-1][0]:16.0f} {rounds[-1][1]:16.0f} {rounds[-1][0] / rounds[-1][1]:8.2f}", flush=True
        )
    # The best round is least affected by other load on the machine.
    for name, pick in (("median", median), ("best", max)):
        lora_rate, peft_rate = (pick(rates) for rates in zip(*rounds, strict=True))
        print(f"{name:>6} {lora_rate:15.0f} {peft_rate:16.0f} {lora_rate / peft_rate:8.2f}")


def _rate(run: Run) -> float:
    """Return the real tokens per second of a run, without its first step."""
    counted = run.steps[1:]
    return sum(step.tokens for step in counted) / sum(step.seconds for step in counted)


# --- rows ---------------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """The rows of a comparison, in a file for lora and encoded for PEFT."""

    file: Path
    rows: list[EncodedRow]


def select_rows(data: Path, tokenizer: Any, *, count: int, max_length: int, scratch: Path) -> Selection:
    """Select the first `count` rows of at most `max_length` tokens, and write them to a file in `scratch`."""

    def short_rows() -> Iterator[tuple[dict[str, str], EncodedRow]]:
        for row in json.loads(data.read_text(encoding="utf-8")):
            encoded = encode(tokenizer, row)
            if len(encoded[0]) <= max_length:
                yield row, encoded

    pairs = [pair for _, pair in zip(range(count), short_rows(), strict=False)]
    if len(pairs) < count:
        sys.exit(f"{data} has {len(pairs)} rows of at most {max_length} tokens, but {count} are needed: lower --steps")
    file = scratch / "rows.json"
    file.write_text(json.dumps([row for row, _ in pairs], ensure_ascii=False), encoding="utf-8")
    tokens = sum(len(ids) for _, (ids, _) in pairs)
    print(f"{data.name}: the first {count} rows of at most {max_length} tokens, {tokens:,} tokens in total")
    return Selection(file, [encoded for _, encoded in pairs])


def info(line: str) -> None:
    """Print a progress message to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare lora train with plain transformers + PEFT.")
    parser.add_argument("data", type=Path, help="alpaca file: a JSON list of {instruction, input, output}")
    parser.add_argument("--model", type=Path, default=MODEL, help="GGUF file of the base model")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 15; with --speed 8)")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch when comparing losses")
    parser.add_argument("--speed", action="store_true", help="compare tokens per second instead of losses")
    parser.add_argument("--rounds", type=int, default=2, help="with --speed: number of runs of each")
    arguments = parser.parse_args()
    for file in (arguments.data, arguments.model):
        if not file.is_file():
            sys.exit(f"{file} not found; scripts/quickstart downloads the model")
    arguments.steps = arguments.steps or (8 if arguments.speed else 15)
    if arguments.speed and arguments.steps < 2:
        parser.error("--speed needs --steps of at least 2, because the first step is not counted")
    tokenizer = AutoTokenizer.from_pretrained(
        unpack_gguf(arguments.model, dtype=torch.float32, cache=cache_folder(), info=info)
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if arguments.speed:
            count = min(arguments.steps * 16, len(json.loads(arguments.data.read_text(encoding="utf-8"))))
            compare_speed(
                arguments, select_rows(arguments.data, tokenizer, count=count, max_length=512, scratch=scratch), scratch
            )
            return
        count = arguments.steps * arguments.rows
        selected = select_rows(arguments.data, tokenizer, count=count, max_length=192, scratch=scratch)
        sys.exit(0 if compare_losses(arguments, selected, scratch) else 1)


if __name__ == "__main__":
    main()
