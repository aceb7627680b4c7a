"""Convert the E2E rows of the LoRA paper's code (`meaning||reference`, a line each) to prompt and completion.

    python scripts/make_e2e_data.py train.txt data/e2e/train.jsonl

As its gpt2_encode.py does with --add_bos and --add_eos: the meaning, <|endoftext|>, a blank and the reference; training
adds the end token. Needs the standard library alone.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

BETWEEN = "<|endoftext|>"  # GPT-2's only special token, which the code puts between meaning and reference


def rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """A row for each line.

    Raises:
        ValueError: a line that is not `meaning||reference`.
    """
    for number, line in enumerate(lines, start=1):
        meaning, found, reference = line.strip().partition("||")
        if not found or "||" in reference:
            raise ValueError(f"line {number} is not meaning||reference: {line.strip()[:60]!r}")
        yield {"prompt": meaning + BETWEEN, "completion": f" {reference}"}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    with source.open(encoding="utf-8") as lines:
        texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(lines)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(texts), encoding="utf-8")
    print(f"{len(texts):,} rows in {target}")


if __name__ == "__main__":
    main()
