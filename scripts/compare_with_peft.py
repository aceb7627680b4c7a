"""Train the same rows with `lora train` and with plain transformers + PEFT, and compare step by step.

    python scripts/compare_with_peft.py DATA.json            # equal losses, fp32: about 3 minutes on 2 cores
    python scripts/compare_with_peft.py DATA.json --speed    # real tokens a second, each as it would be used

DATA.json is an alpaca file: a list of {instruction, input, output}. Exits 1 where the two have different trainable
parameters, or where a step's loss differs by more than 2 %.
"""

# ruff: noqa: E402 - what the libraries read while they are imported is set first
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
from lora_cli.data.dataset import Row
from lora_cli.model.base_model import cache_folder
from lora_cli.model.gguf_base import unpack_gguf

transformers_logging.disable_progress_bar()

MODEL = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED, RATE, RANK, ALPHA = 42, 2e-4, 16, 32
ALLOWED = 0.02  # relative difference of one step's loss
TOKENS = 1024  # --speed: in one of our packed batches, and about as many real ones in one of theirs
Ids = tuple[list[int], list[int]]  # input_ids and labels of one row


class Step(NamedTuple):
    """What either side says of an optimizer step."""

    loss: float
    tokens: int  # real ones
    seconds: float


class Run(NamedTuple):
    """One side's training."""

    trainable: int
    steps: list[Step]


# --- plain transformers + PEFT, as its documentation does it -----------------------------------------------------


def encode(tokenizer: Any, row: dict[str, str]) -> Ids:
    """Chat template, and loss on the answer up to its end-of-turn token."""
    question = {"role": "user", "content": "\n".join(part for part in (row["instruction"], row.get("input")) if part)}
    answer = {"role": "assistant", "content": row["output"]}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template([question, answer], return_dict=True)["input_ids"]
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids, [-100] * len(prompt) + ids[len(prompt) : end] + [-100] * (len(ids) - end)


def pad(rows: Sequence[Ids], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


def plain_peft(folder: Path, rows: list[Ids], batches: list[list[int]], *, bf16: bool, dropout: float) -> Run:
    dtype = torch.bfloat16 if bf16 else torch.float32
    pad_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(batches))
    model.train()
    steps = []
    for batch in batches:
        began = time.perf_counter()
        inputs = pad([rows[i] for i in batch], pad_id)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.append(Step(loss.item(), int(inputs["attention_mask"].sum()), time.perf_counter() - began))
    return Run(sum(p.numel() for p in trained), steps)


# --- lora train ---------------------------------------------------------------------------------------------------


def lora_train(model: Path, data: Path, output: Path, **changes: Any) -> Run:
    """Write a recipe, run `lora train` on it, and read what the run left behind."""
    recipe = {
        "model": {"path": str(model), "dtype": changes.pop("dtype")},
        "adapter": {
            "rank": RANK,
            "alpha": ALPHA,
            "target_modules": "all-linear",
            "dropout": changes.pop("dropout"),
        },
        "data": {"train": str(data), "format": "alpaca", "eval": None, "packing": changes.pop("packing")},
        "training": {"learning_rate": RATE, "warmup": 0, "seed": SEED, "save_every": None, **changes},
        "output": str(output),
    }
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"lora train ended with exit code {done.returncode}:\n{done.stderr}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((output / "manifest.json").read_text())
    steps = [Step(line["loss"], line["tokens"], line["seconds"]) for line in lines if "loss" in line]
    return Run(manifest["trainable_parameters"], steps)


# --- the two comparisons ------------------------------------------------------------------------------------------


class EncodedRows:
    """The reference's rows in the form that a plan of batches takes."""

    def __init__(self, rows: Sequence[Ids]) -> None:
        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Row:
        ids, labels = (np.array(part, dtype=np.int32) for part in self.rows[i])
        return Row(ids, labels, f"row {i}")


def compare_losses(arguments: argparse.Namespace, chosen: "Chosen", scratch: Path) -> bool:
    """Print both losses of every step; returns whether they agree."""
    plan = BatchPlan(EncodedRows(chosen.ids), packing=False, size=arguments.rows, batches_per_step=1, seed=SEED)
    info("lora train ...")
    ours = lora_train(
        arguments.model,
        chosen.file,
        scratch / "run",
        dtype="float32",
        dropout=0.0,
        packing=False,
        batch_size=arguments.rows,
        epochs=1,
    )
    info("transformers + PEFT ...")
    folder = unpack_gguf(arguments.model, dtype=torch.float32, cache=cache_folder(), info=info)
    theirs = plain_peft(folder, chosen.ids, plan.epoch(0), bf16=False, dropout=0.0)

    print(f"\ntrainable parameters   lora {ours.trainable:,}   PEFT {theirs.trainable:,}")
    print("\nstep   tokens    loss: lora     loss: PEFT    difference")
    differences = []
    for number, (our, their) in enumerate(zip(ours.steps, theirs.steps, strict=True), 1):
        differences.append(abs(our.loss / their.loss - 1))
        tokens = f"{our.tokens:,}" if our.tokens == their.tokens else f"{our.tokens:,}/{their.tokens:,}"
        print(f"{number:4} {tokens:>8} {our.loss:13.6f} {their.loss:14.6f}    {differences[-1]:10.1e}")
    print(f"\nlargest difference   {max(differences):.1e}   (allowed {ALLOWED:.0%})")
    seconds = [median(step.seconds for step in run.steps[1:] or run.steps) for run in (ours, theirs)]
    print(
        f"seconds a step       lora {seconds[0]:.2f}   PEFT {seconds[1]:.2f}   (medians, fp32, the same padded batches)"
    )
    same_count = ours.trainable == theirs.trainable
    same_rows = all(a.tokens == b.tokens for a, b in zip(ours.steps, theirs.steps, strict=True))
    agree = same_count and same_rows and max(differences) <= ALLOWED
    print("equal" if agree else "DIFFERENT", end="")
    print("" if agree else f": parameters {same_count}, tokens {same_rows}, losses {max(differences) <= ALLOWED}")
    return agree


def compare_speed(arguments: argparse.Namespace, chosen: "Chosen", scratch: Path) -> None:
    """Train in turn, ours and theirs, each as it would be used, and print real tokens a second."""
    steps = arguments.steps
    lengths = [len(ids) for ids, _ in chosen.ids]
    size = max(1, round(TOKENS / (sum(lengths) / len(lengths))))
    order = np.random.default_rng(SEED).permutation(len(lengths)).tolist()
    batches = [order[start : start + size] for start in range(0, size * steps, size)]
    folder = unpack_gguf(arguments.model, dtype=torch.bfloat16, cache=cache_folder(), info=info)
    print(
        f"\nlora: rows packed into {TOKENS} tokens; PEFT: {size} rows a batch, padded; bf16, dropout 0.05, all-linear"
    )
    print(f"{steps} steps each time, the first of them left out\n")
    print("round    lora tokens/s    PEFT tokens/s    ratio")
    rounds = []
    for number in range(1, arguments.rounds + 1):
        ours = lora_train(
            arguments.model,
            chosen.file,
            scratch / f"run-{number}",
            dtype="bfloat16",
            dropout=0.05,
            packing=True,
            tokens_per_batch=TOKENS,
            max_steps=steps,
        )
        theirs = plain_peft(folder, chosen.ids, batches, bf16=True, dropout=0.05)
        rounds.append((_rate(ours), _rate(theirs)))
        print(
            f"{number:5} {rounds[-1][0]:16.0f} {rounds[-1][1]:16.0f} {rounds[-1][0] / rounds[-1][1]:8.2f}", flush=True
        )
    # The best of each is what the machine does when nobody else uses it.
    for name, pick in (("median", median), ("best", max)):
        our, their = (pick(rates) for rates in zip(*rounds, strict=True))
        print(f"{name:>6} {our:15.0f} {their:16.0f} {our / their:8.2f}")


def _rate(run: Run) -> float:
    counted = run.steps[1:]
    return sum(step.tokens for step in counted) / sum(step.seconds for step in counted)


# --- rows ---------------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The rows of a comparison, in a file for lora and encoded for PEFT."""

    file: Path
    ids: list[Ids]


def choose(data: Path, tokenizer: Any, *, count: int, longest: int, scratch: Path) -> Chosen:
    """The first `count` rows of at most `longest` tokens."""

    def fitting() -> Iterator[tuple[dict[str, str], Ids]]:
        for row in json.loads(data.read_text(encoding="utf-8")):
            ids = encode(tokenizer, row)
            if len(ids[0]) <= longest:
                yield row, ids

    found = [pair for _, pair in zip(range(count), fitting(), strict=False)]
    if len(found) < count:
        sys.exit(f"{data} has {len(found)} rows of at most {longest} tokens, and {count} are needed: lower --steps")
    file = scratch / "rows.json"
    file.write_text(json.dumps([row for row, _ in found], ensure_ascii=False), encoding="utf-8")
    tokens = sum(len(ids) for _, (ids, _) in found)
    print(f"{data.name}: the first {count} rows of at most {longest} tokens, {tokens:,} tokens in all")
    return Chosen(file, [ids for _, ids in found])


def info(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare lora train with plain transformers + PEFT.")
    parser.add_argument("data", type=Path, help="alpaca file: a JSON list of {instruction, input, output}")
    parser.add_argument("--model", type=Path, default=MODEL, help="GGUF file of the base model")
    parser.add_argument("--steps", type=int, help="optimizer steps (15; with --speed 8)")
    parser.add_argument("--rows", type=int, default=4, help="rows in a batch of the loss comparison")
    parser.add_argument("--speed", action="store_true", help="compare tokens a second instead of losses")
    parser.add_argument("--rounds", type=int, default=2, help="with --speed: how often each trains")
    arguments = parser.parse_args()
    for file in (arguments.data, arguments.model):
        if not file.is_file():
            sys.exit(f"there is no file {file}; scripts/quickstart fetches the model")
    arguments.steps = arguments.steps or (8 if arguments.speed else 15)
    if arguments.speed and arguments.steps < 2:
        parser.error("--speed needs --steps of at least 2, as the first is not counted")
    tokenizer = AutoTokenizer.from_pretrained(
        unpack_gguf(arguments.model, dtype=torch.float32, cache=cache_folder(), info=info)
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if arguments.speed:
            count = min(arguments.steps * 16, len(json.loads(arguments.data.read_text(encoding="utf-8"))))
            compare_speed(
                arguments, choose(arguments.data, tokenizer, count=count, longest=512, scratch=scratch), scratch
            )
            return
        chosen = choose(arguments.data, tokenizer, count=arguments.steps * arguments.rows, longest=192, scratch=scratch)
        sys.exit(0 if compare_losses(arguments, chosen, scratch) else 1)


if __name__ == "__main__":
    main()
