"""Convert the E2E dataset of the LoRA paper's code (lines `meaning||reference`) to the prompt-completion format.

    python scripts/make_e2e_data.py train.txt data/e2e/train.jsonl

The text is that of its gpt2_encode.py with --add_bos and --add_eos: the meaning, <|endoftext|>, a space, the reference.
Training adds the end token. Needs only the standard library.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = "<|endoftext|>"  # GPT-2's only special token; the code puts it between meaning and reference


def rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield a row for each line.

    Raises:
        ValueError: a line is not `meaning||reference`.
    """
    for number, line in enumerate(lines, start=1):
        meaning, separator, reference = line.strip().partition("||")
        if not separator or "||" in reference:
            raise ValueError(f"line {number} is not meaning||reference: {line.strip()[:60]!r}")
        yield {"prompt": meaning + SEPARATOR, "completion": f" {reference}"}


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
