"""Fine-tune the demo model on E2E NLG (descriptions of restaurants), and score base and adapter on all references.

    python scripts/evaluate_e2e.py e2e_valid.txt e2e_test.txt     # run scripts/quickstart first; minutes on two cores
    python scripts/evaluate_e2e.py e2e_valid.txt e2e_test.txt --meanings 630    # the full test set

The files are those of the LoRA paper's code, `meaning||reference` on each line (Novikova et al., arXiv:1706.09254).
Training uses a part of the smaller split, so the figures compare base and adapter, and not this tool with papers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = "Describe this restaurant in one or two sentences.\n"


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Return meaning and reference of each line."""
    pairs = [line.partition("||")[::2] for line in file.read_text(encoding="utf-8").splitlines() if "||" in line]
    return [(meaning.strip(), reference.strip()) for meaning, reference in pairs]


def write_messages(pairs: list[tuple[str, str]], file: Path) -> None:
    """Write the pairs as conversations in the `messages` format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    conversations = (
        [{"role": "user", "content": INSTRUCTION + meaning}, {"role": "assistant", "content": reference}]
        for meaning, reference in pairs
    )
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--meanings", type=int, default=60, help="number of meanings, evenly spaced in the test set")
    arguments = parser.parse_args()
    folder = ROOT / "data" / "e2e"
    write_messages(read_pairs(arguments.train), folder / "train.jsonl")
    test = read_pairs(arguments.test)
    meanings = list(dict.fromkeys(meaning for meaning, _ in test))
    chosen = set(meanings[:: max(1, len(meanings) // arguments.meanings)][: arguments.meanings])
    write_messages([pair for pair in test if pair[0] in chosen], folder / "test.jsonl")
    print(f"{len(chosen)} of {len(meanings)} meanings, {sum(m in chosen for m, _ in test)} references", flush=True)
    overrides = {
        "data.train": "data/e2e/train.jsonl",
        "training.max_steps": arguments.steps,
        "output": "runs/e2e",
    }
    lora = [sys.executable, "-m", "lora_cli"]
    set_options = [option for key, value in overrides.items() for option in ("--set", f"{key}={value}")]
    metric_options = [option for name in ("bleu", "rouge", "chrf") for option in ("--metric", name)]
    data = ["--data", "data/e2e/test.jsonl", "--answers", str(arguments.meanings)]
    files = ["--predictions", "runs/e2e/predictions.jsonl", "--json", "runs/e2e/eval.json"]
    for command in (
        ["train", "configs/quickstart.yaml", "--fresh", *set_options],
        ["eval", "runs/e2e", *data, *metric_options, *files],
    ):
        subprocess.run([*lora, *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)


if __name__ == "__main__":
    main()
