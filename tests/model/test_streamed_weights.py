"""Operations on a streamed weight have the results of the plain weight, and read no more of it than they need."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lora_cli.model import safetensors_io
from lora_cli.model.checkpoint_reader import CheckpointReader
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.streamed_weights import Source, StreamedWeight, find_slots, stream_weights
from tests.model import zoo
from tests.support import checkpoints

NAME = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    zoo.make("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


class CountingReader(CheckpointReader):
    """Counts the rows that are read, by parameter; -1 for each full parameter."""

    def read(self, name: str) -> Tensor:
        self.__dict__.setdefault("counted", []).append((name, -1))
        return super().read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        self.__dict__.setdefault("counted", []).append((name, stop - start))
        return super().read_rows(name, start, stop)


@pytest.fixture(scope="module")
def mapping(folder: Path) -> CheckpointMapping:
    return CheckpointMapping(checkpoints.checkpoint(folder).skeleton(), safetensors_io.list_tensors(folder))


@pytest.fixture
def reader(folder: Path, mapping: CheckpointMapping) -> Iterator[CountingReader]:
    tensors = safetensors_io.list_tensors(folder)
    with safetensors_io.ShardFiles(writable=False) as files:
        yield CountingReader(tensors, mapping, files, tied=(), shapes={}, transforms={})


def streamed(reader: CheckpointReader, pool: ThreadPoolExecutor, name: str = NAME) -> StreamedWeight:
    stored = reader.stored(name)
    assert stored is not None
    return StreamedWeight(Source(reader, name, pool), stored.shape, torch.float32)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: functional.linear(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 64), w),
    "linear with a bias": lambda w: functional.linear(torch.ones(5, 64), w, torch.arange(97.0)),
    "linear of one vector": lambda w: functional.linear(torch.ones(64), w),
    "linear of nothing": lambda w: functional.linear(torch.ones(0, 64), w),
    "embedding": lambda w: functional.embedding(torch.tensor([[3, 96], [0, 3]]), w, padding_idx=0),
    "product": lambda w: torch.ones(2, 97) @ w,
    "transposed": lambda w: w.T.contiguous(),
    "data": lambda w: w.data + 1,
    "element": lambda w: w[3, 5],
    "row": lambda w: w[torch.tensor(3)],
    "method": lambda w: w.float().pow(2).sum(dim=1),
    "concatenated": lambda w: torch.cat([w, w]),
    "norm": lambda w: torch.linalg.norm(w, dim=1),
    "another dtype": lambda w: w.to(torch.float64),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_the_result_of_the_plain_weight(
    operation: str, reader: CountingReader, pool: ThreadPoolExecutor
):
    result = OPERATIONS[operation](streamed(reader, pool))
    assert type(result) is Tensor
    assert torch.allclose(result, OPERATIONS[operation](reader.read(NAME)), rtol=1e-6, atol=1e-6)


def test_a_weight_looks_like_a_parameter_and_is_not_read_until_it_is_used(
    reader: CountingReader, pool: ThreadPoolExecutor
):
    weight = streamed(reader, pool)
    assert isinstance(nn.Parameter(weight, requires_grad=False), nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((97, 64), torch.float32, "cpu")
    assert (weight.ndim, weight.numel(), weight.requires_grad) == (2, 97 * 64, False)
    assert "counted" not in reader.__dict__
    functional.embedding(torch.tensor([3, 3, 7]), weight)
    assert reader.__dict__["counted"] == [(NAME, 1), (NAME, 1)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), inputs=st.integers(0, 5), block=st.integers(1, 200))
def test_products_in_blocks_are_the_product(
    rows: int,
    columns: int,
    inputs: int,
    block: int,
    mapping: CheckpointMapping,
    pool: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
):
    file = tmp_path_factory.mktemp("w") / "model.safetensors"
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    save_file({NAME: weight}, file)
    x = torch.randn(inputs, columns, generator=generator)
    with pytest.MonkeyPatch.context() as patch, safetensors_io.ShardFiles(writable=False) as files:
        patch.setattr("lora_cli.model.checkpoint_reader.BLOCK_WEIGHTS", block)
        tensors = safetensors_io.list_tensors(file.parent)
        reader = CheckpointReader(tensors, mapping, files, tied=(), shapes={}, transforms={})
        product = functional.linear(x, streamed(reader, pool))
    assert torch.allclose(product, x @ weight.float().T, rtol=1e-5, atol=1e-5)


def test_a_model_runs_with_streamed_weights_and_reads_each_once(
    folder: Path, reader: CountingReader, pool: ThreadPoolExecutor
):
    model = checkpoints.checkpoint(folder).skeleton(buffers=torch.float32)
    stream_weights(find_slots(model), reader, pool=pool, dtypes={})
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        assert zoo.relative(logits, checkpoints.load(folder).eval()(input_ids=ids).logits) < 1e-6
    read = reader.__dict__["counted"]
    for name, slot in find_slots(model).items():
        rows = [count for key, count in read if key == name]
        embedding = name == NAME
        assert sum(rows) == (17 if embedding else slot.value.shape[0] if slot.value.ndim == 2 else -1), name


def test_slots_are_found_again_after_their_module_is_wrapped(folder: Path):
    model = checkpoints.load(folder)
    slots = find_slots(model)
    assert slots.keys() == model.state_dict().keys()
    slot = slots["model.layers.0.mlp.up_proj.weight"]
    before = slot.value
    wrapper = zoo.attached(model).get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    assert wrapper is not slot.module
    assert wrapper.get_parameter("base_layer.weight") is before is slot.value
