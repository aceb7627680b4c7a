"""Teach the demo model to describe restaurants (E2E NLG), and score base and adapter with all references of a meaning.

    python scripts/evaluate_e2e.py e2e_valid.txt e2e_test.txt     # after scripts/quickstart; minutes on two cores
    python scripts/evaluate_e2e.py e2e_valid.txt e2e_test.txt --meanings 630    # the whole test set

The files are those of the LoRA paper's code, `meaning||reference` a line (Novikova et al., arXiv:1706.09254). A part of
the smaller split is trained on: figures are for comparing base and adapter, not with papers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASK = "Describe this restaurant in one or two sentences.\n"


def rows(file: Path) -> list[tuple[str, str]]:
    """Meaning and reference of each line."""
    pairs = [line.partition("||")[::2] for line in file.read_text(encoding="utf-8").splitlines() if "||" in line]
    return [(meaning.strip(), reference.strip()) for meaning, reference in pairs]


def write(pairs: list[tuple[str, str]], file: Path) -> None:
    """As conversations."""
    file.parent.mkdir(parents=True, exist_ok=True)
    turns = (
        [{"role": "user", "content": ASK + meaning}, {"role": "assistant", "content": reference}]
        for meaning, reference in pairs
    )
    file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--meanings", type=int, default=60, help="of the test set, spread over it")
    given = parser.parse_args()
    folder = ROOT / "data" / "e2e"
    write(rows(given.train), folder / "train.jsonl")
    test = rows(given.test)
    meanings = list(dict.fromkeys(meaning for meaning, _ in test))
    chosen = set(meanings[:: max(1, len(meanings) // given.meanings)][: given.meanings])
    write([pair for pair in test if pair[0] in chosen], folder / "test.jsonl")
    print(f"{len(chosen)} of {len(meanings)} meanings, {sum(m in chosen for m, _ in test)} references", flush=True)
    settings = {
        "data.train": "data/e2e/train.jsonl",
        "training.max_steps": given.steps,
        "output": "runs/e2e",
    }
    lora = [sys.executable, "-m", "lora_cli"]
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    scores = [word for name in ("bleu", "rouge", "chrf") for word in ("--metric", name)]
    told = ["--data", "data/e2e/test.jsonl", "--answers", str(given.meanings), *scores]
    files = ["--predictions", "runs/e2e/predictions.jsonl", "--json", "runs/e2e/eval.json"]
    for command in (
        ["train", "configs/quickstart.yaml", "--fresh", *words],
        ["eval", "runs/e2e", *told, *files],
    ):
        subprocess.run([*lora, *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)


if __name__ == "__main__":
    main()
