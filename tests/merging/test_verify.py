"""Verification: how many tokens it compares, and that it ends with the merge that it belongs to."""

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.merging import compare_models, verify
from lora_cli.merging.verify import MAX_LOGITS, MAX_TOKENS, MIN_TOKENS, TOKEN_WEIGHTS, BaseWeights, Probes
from lora_cli.model import save_adapter
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.checkpoint_reader import CheckpointReader
from lora_cli.model.saved_adapter import SavedAdapter
from tests.model import zoo
from tests.support import checkpoints


@given(parameters=st.integers(1, 10**12), vocabulary=st.integers(2, 10**6))
def test_large_models_and_vocabularies_are_compared_on_fewer_tokens(parameters: int, vocabulary: int):
    tokens = verify.probe_tokens(parameters, vocabulary)
    assert MIN_TOKENS <= tokens <= MAX_TOKENS
    if tokens > MIN_TOKENS:
        assert tokens * parameters <= TOKEN_WEIGHTS
        assert tokens * vocabulary <= MAX_LOGITS
    assert tokens >= verify.probe_tokens(parameters * 2, vocabulary)


@pytest.fixture
def adapter(tmp_path: Path) -> SavedAdapter:
    model = zoo.make("llama")
    model.save_pretrained(tmp_path / "base")
    save_adapter.save_adapter(zoo.adapted(model), tmp_path / "adapter", base="x", revision=None)
    base = checkpoints.checkpoint(tmp_path / "base")
    return SavedAdapter(open_adapter(tmp_path / "adapter"), base)


def test_a_merge_that_fails_ends_the_runs_of_its_verification(adapter: SavedAdapter, monkeypatch: pytest.MonkeyPatch):
    """The first read waits until the merge fails; of the many others, at most those of the same product follow."""
    reads: list[str] = []
    started, failed = threading.Event(), threading.Event()
    read_rows = CheckpointReader.read_rows

    def read_and_wait(self: CheckpointReader, name: str, start: int, stop: int) -> Any:
        reads.append(name)
        started.set()
        assert failed.wait(timeout=60)
        return read_rows(self, name, start, stop)

    monkeypatch.setattr(CheckpointReader, "read_rows", read_and_wait)
    batch = compare_models.random_probes("causal-lm", tokens=48, vocabulary=90, pad_id=0, start_id=None, end_id=None)
    threads = threading.active_count()
    with verify.open_streams() as streams:
        shutdown = streams.pool.shutdown

        def fail(**options: bool) -> None:
            failed.set()
            shutdown(**options)

        def merge() -> None:
            with verify.verification(adapter, Probes(batch, ""), BaseWeights({}), streams):
                assert started.wait(timeout=60)
                raise OSError("disk full")

        monkeypatch.setattr(streams.pool, "shutdown", fail)
        with pytest.raises(OSError, match="disk full"):
            merge()
        assert len(set(reads)) <= 2  # of 15 parameters of each layer, and the head
    assert threading.active_count() == threads
