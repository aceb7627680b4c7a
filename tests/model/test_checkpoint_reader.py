"""Single parameters, rows and experts read from a checkpoint are those of the loaded model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.model import empty_base, safetensors_io
from lora_cli.model.checkpoint_reader import BLOCK_WEIGHTS, CheckpointReader, Transforms, has_new_rows, row_blocks
from lora_cli.model.conversion import CheckpointMapping
from tests.model import families, zoo
from tests.model.families import FAMILIES
from tests.support import checkpoints

NO_TRANSFORMS: Transforms = {}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    zoo.make("llama").save_pretrained(folder)
    return folder


@contextmanager
def reader_of(
    folder: Path, *, shapes: Mapping[str, tuple[int, ...]] | None = None, transforms: Transforms = NO_TRANSFORMS
) -> Iterator[CheckpointReader]:
    tensors = safetensors_io.list_tensors(folder)
    model = checkpoints.checkpoint(folder).skeleton()
    with safetensors_io.ShardFiles(writable=False) as files:
        yield CheckpointReader(
            tensors,
            CheckpointMapping(model, tensors),
            files,
            tied=empty_base.tied_parameters(model),
            shapes=shapes or {},
            transforms=transforms,
        )


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "gpt-oss", "granite-moe", "llama4"])
def test_parameters_and_experts_are_those_of_the_loaded_model(family: str, tmp_path: Path):
    folder = tmp_path / "base"
    if family in FAMILIES:
        families.write(FAMILIES[family], folder)
    else:
        zoo.make(family).save_pretrained(folder)
    loaded = checkpoints.load(folder)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    with reader_of(folder) as reader:
        assert all(reader.has(name) for name in parameters)
        for name, parameter in parameters.items():
            assert torch.equal(reader.read(name).float(), parameter), name
            if parameter.ndim == 3:
                experts = [reader.read_expert(name, index) for index in range(len(parameter))]
                assert torch.equal(torch.stack(experts).float(), parameter), name
        assert not reader.has("model.none.weight")


def test_an_expert_of_a_layer_is_read_without_the_others(tmp_path: Path):
    """In this checkpoint, each expert has tensors of its own."""
    families.write(FAMILIES["mixtral"], tmp_path)
    read: list[str] = []
    with reader_of(tmp_path) as reader:
        files_read = reader._read_key
        reader._read_key = lambda key: read.append(key) or files_read(key)  # type: ignore[method-assign, func-returns-value]
        reader.read_expert("model.layers.0.mlp.experts.gate_up_proj", 1)
    assert len(read) == 2
    assert all(".experts.1." in key for key in read)


@pytest.mark.parametrize("new", [0, 1, 5])
def test_rows_are_slices_of_the_full_parameter(new: int, llama: Path):
    """New rows, for tokens that the checkpoint does not have, are the mean row."""
    name, rows = "model.embed_tokens.weight", zoo.VOCABULARY + new
    with reader_of(llama, shapes={name: (rows, 64)}) as reader:
        full = reader.read(name)
        assert full.shape == (rows, 64)
        assert (full[zoo.VOCABULARY :] == full[: zoo.VOCABULARY].mean(dim=0)).all()
        places = [0, 1, zoo.VOCABULARY - 1, zoo.VOCABULARY, rows]
        for start, stop in [(a, b) for a in places for b in places if a <= b <= rows]:
            assert torch.equal(reader.read_rows(name, start, stop), full[start:stop]), (start, stop)


def test_a_transformed_parameter_is_not_what_is_stored(llama: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    with reader_of(llama, transforms={name: torch.Tensor.neg}) as changed, reader_of(llama) as reader:
        assert changed.stored(name) is None
        stored = reader.stored(name)
        assert stored is not None
        assert stored.shape == (128, 64)
        assert torch.equal(changed.read(name), -reader.read(name))


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=3))
def test_blocks_of_rows_follow_each_other_and_are_small(shape: list[int]):
    blocks = list(row_blocks(shape))
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][: len(blocks)]
    assert (blocks[-1].stop if blocks else 0) == shape[0]
    row = int(torch.tensor(shape[1:]).prod())
    assert all((block.stop - block.start) * row <= max(BLOCK_WEIGHTS, row) for block in blocks)


@pytest.mark.parametrize(
    ("stored", "expected", "result"),
    [
        ((5, 3), (6, 3), True),
        ((5, 3), (5, 3), False),
        ((5, 3), (4, 3), False),
        ((5, 3), (6, 4), False),
        ((), (), False),
    ],
)
def test_only_missing_last_rows_are_new_rows(stored: tuple[int, ...], expected: tuple[int, ...], result: bool):
    assert has_new_rows(stored, expected) is result
