"""Types of dataset files: which reader reads which suffix, plain or compressed. No tokenizer, no torch."""

from collections.abc import Callable, Iterator

from lora_cli.data.data_file import COMPRESSIONS, DataFile
from lora_cli.data.read_binary import read_parquet
from lora_cli.data.read_tables import read_csv, read_tsv
from lora_cli.data.readers import read_json, read_jsonl, read_txt
from lora_cli.data.records import Line

READERS: dict[str, Callable[[DataFile], Iterator[Line]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}
NOT_COMPRESSED = {".parquet"}  # compressed inside, and read from its end
WITH_DELIMITER = {".csv", ".tsv"}
SUPPORTED = f"{' '.join(READERS)}; text files also {' '.join(COMPRESSIONS)}"


def is_readable(file: DataFile) -> bool:
    """Return whether there is a reader for the file."""
    return file.suffix in READERS and not (file.compression and file.suffix in NOT_COMPRESSED)
