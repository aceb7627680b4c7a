"""Open an adapter folder: the one door of every command to a saved adapter, of this tool or another.

Checksums, configuration, the header and every value of the weights, trained_on.json and labels.json are checked here,
before a base is loaded. What a command gets is one record, `AdapterFiles`.
"""

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.data.class_labels import LABELS_FILE, ClassLabels, load_labels
from lora_cli.errors import LoraError
from lora_cli.model.adapter_config import read_adapter_config
from lora_cli.model.config_values import targeted
from lora_cli.model.finite import check_finite
from lora_cli.model.foreign_adapters.detect import conversion_hint, find_foreign
from lora_cli.model.safetensors_header import StoredTensor, read_header
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS, TOKENIZER_FILES
from lora_cli.model.trained_on import TRAINED_ON_FILE, Origin, TrainedOn, read_trained_on
from lora_cli.run import console
from lora_cli.run.checksums import CHECKSUMS_FILE, find_damage, read_checksums
from lora_cli.run.folder import CONFIG_FILE, run_of_adapter
from lora_cli.run.read_file import printable, read_text
from lora_cli.run.run_checksums import find_changed_records

PREFIX = "base_model.model."  # of the base's parameter names in PEFT's files
# Files that decide what an adapter computes. A change of another one, such as README.md, is told only.
DECISIVE_FILES = (CONFIG_FILE, ADAPTER_WEIGHTS, TRAINED_ON_FILE, LABELS_FILE, *TOKENIZER_FILES)
TEMPLATE_FILE = "chat_template.jinja"
FETCH_HINT = "fetch the adapter again"
NOT_FINITE_HINT = "such an adapter computes nothing; use an earlier checkpoint, or fetch it again"
FACTOR_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$"
)
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")  # of DoRA; PEFT has written both names
LORA_BIAS = "lora_B.bias"
WRAPPED = ".base_layer"  # of PEFT's layers over several parameters of one module
# Keys of PEFT's configurations that are sizes of saved tensors: a larger one would only take memory.
SIZES = (
    *("r", "init_r", "target_r", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"),
    *("adapter_len", "n_frequency", "num_vectors", "vector_length", "xlora_size", "hidden_size"),
)
MAX_HIDDEN_SIZE = 1 << 16  # of the network of p-tuning and prefix tuning, whose weights are not saved
NOT_SAVED_SIZES = ("encoder_hidden_size",)


class AdapterFiles(NamedTuple):
    """A saved adapter whose files were checked."""

    folder: Path
    config: PeftConfig  # never modified: PEFT gets copies
    tensors: Mapping[str, StoredTensor]  # in the file of weights, by PEFT's name
    trained_on: TrainedOn | None  # None for adapters of other tools
    labels: ClassLabels | None  # of labels.json
    chat_template: str | None  # of chat_template.jinja

    @property
    def method(self) -> str:
        """PEFT's name of the method, in words: `lora`, `prefix tuning`."""
        return str(self.config.peft_type.value).lower().replace("_", " ")

    @property
    def names_in_base(self) -> set[str]:
        """The names of the tensors, without the wrappers that PEFT puts around layers."""
        return {unwrapped_name(key) for key in self.tensors}

    @property
    def step(self) -> int | None:
        """The optimizer step that it was saved after; None for adapters of other tools."""
        return self.trained_on.step if self.trained_on else None

    def origins_up_to(self, name: str) -> list[Origin]:
        """Return the chain of adapters up to this one, shown as `name`, the oldest first."""
        own = {
            "adapter": name,
            "digest": sha256((self.folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest(),
            "step": self.step,
        }
        return [*(self.trained_on.origins if self.trained_on else []), own]

    def load(self) -> dict[str, Tensor]:
        """Load all tensors, in their shapes and dtypes in the file, by PEFT's names."""
        return load_file(self.folder / ADAPTER_WEIGHTS)


def unwrapped_name(key: str) -> str:
    """Return a parameter's name without PEFT's wrapper around its layer."""
    return key.replace(".base_layer.", ".")


def open_adapter(folder: Path) -> AdapterFiles:
    """Open the adapter in `folder`, and check all that can be checked without its base.

    Raises:
        LoraError: `folder` is not an adapter; a file is damaged, or not the one that was written; a key or value of its
            configuration cannot be honored; a tensor is not finite, or does not fit the configuration.
    """
    _check_weights_exist(folder)
    _check_damage(folder)
    for line in find_changed_records(run_of_adapter(folder)):
        console.info(line)
    config = read_adapter_config(folder)
    tensors = read_header(folder / ADAPTER_WEIGHTS, hint=FETCH_HINT)
    if not tensors:
        raise LoraError(f"{folder / ADAPTER_WEIGHTS} has no tensors", hint=FETCH_HINT)
    adapter = AdapterFiles(folder, config, tensors, read_trained_on(folder), load_labels(folder), _template(folder))
    _check_sizes(adapter)
    if type(config) is LoraConfig:
        _check_factors(adapter, config)
    check_finite(tensors, hint=NOT_FINITE_HINT)
    return adapter


def _template(folder: Path) -> str | None:
    file = folder / TEMPLATE_FILE
    return read_text(file) if os.path.lexists(file) else None


def _check_weights_exist(folder: Path) -> None:
    if os.path.lexists(folder / ADAPTER_WEIGHTS) or not os.path.lexists(folder / CONFIG_FILE):
        return  # what cannot be read is reported where it is read
    pickled = sorted(path.name for path in folder.glob("adapter_model*") if path.suffix != ".safetensors")
    raise LoraError(
        f"{folder} has no {ADAPTER_WEIGHTS}" + (f", only {pickled[0]}" if pickled else ""),
        hint=conversion_hint(folder) if find_foreign(folder) else FETCH_HINT,
    )


def _check_damage(folder: Path) -> None:
    """Compare the files with checksums.json, if the folder has it; print a line for changes that decide nothing.

    Raises:
        LoraError: a file that decides what the adapter computes is not the one that was written.
    """
    record = read_checksums(folder)
    if record is None:
        return
    hint = f"restore it from a copy; if you changed it yourself, remove {folder / CHECKSUMS_FILE}"
    added = [name for name in DECISIVE_FILES if name not in record.files and os.path.lexists(folder / name)]
    decisive = [name for name in DECISIVE_FILES if name in record.files]
    changed = [
        *find_damage(folder, decisive, follow_links=True),
        *(f"{name} was not there when the adapter was written" for name in added),
    ]
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LoraError(f"{folder} is not the adapter that was verified: {changed[0]}{more}", hint=hint)
    for line in find_damage(folder, sorted(record.files.keys() - set(decisive)), follow_links=True):
        console.info(f"note: {folder}: {line} ({CHECKSUMS_FILE})")


def _check_sizes(adapter: AdapterFiles) -> None:
    """Compare the sizes of the configuration with those of the tensors, before PEFT allocates what it says."""
    largest = max((size for stored in adapter.tensors.values() for size in stored.shape), default=0)
    limits = dict.fromkeys(SIZES, largest) | dict.fromkeys(NOT_SAVED_SIZES, MAX_HIDDEN_SIZE)
    if adapter.method == "lokr":  # a rank above the size of a layer means full matrices
        limits["r"] = MAX_HIDDEN_SIZE
    sizes = [(key, getattr(adapter.config, key, None)) for key in limits]
    sizes += [("rank_pattern", rank) for rank in (getattr(adapter.config, "rank_pattern", None) or {}).values()]
    for key, size in sizes:
        if isinstance(size, int) and size > limits.get(key, limits["r"]):
            raise _mixed(adapter, f"{key} is {size:,}, and no tensor is that large")


def _check_factors(adapter: AdapterFiles, config: LoraConfig) -> None:
    """Compare the factors A and B of LoRA with each other and with the configuration.

    Raises:
        LoraError: one of a pair is missing, or has another rank or module than the configuration.
    """
    pairs: dict[str, dict[str, StoredTensor]] = {}
    has_magnitudes = False
    for name, stored in adapter.tensors.items():
        if match := FACTOR_NAME.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["factor"]] = stored
            if not stored.dtype.startswith(("F", "BF")):
                raise _mixed(adapter, f"{printable(name)} is of {stored.dtype}, not of a floating-point dtype")
        elif ".lora_" in name and not name.endswith((*MAGNITUDES, LORA_BIAS)):
            raise _mixed(adapter, f"{printable(name)} is not a tensor of LoRA")
        has_magnitudes |= name.endswith(MAGNITUDES)
    if has_magnitudes != bool(config.use_dora):
        found = "has DoRA's magnitudes" if has_magnitudes else "has no magnitudes of DoRA"
        raise _mixed(adapter, f"{ADAPTER_WEIGHTS} {found}, and use_dora is {str(bool(config.use_dora)).lower()}")
    modules = sorted({wrapper.replace(WRAPPED, "") for wrapper in pairs})
    found_modules = targeted(adapter.folder / CONFIG_FILE, config, modules)
    # With ensure_weight_tying, PEFT adapts a tied module that is not named.
    by_name = not (config.target_parameters or getattr(config, "ensure_weight_tying", False))
    by_name &= config.target_modules not in (None, "all-linear")
    for wrapper, pair in pairs.items():
        module = wrapper.replace(WRAPPED, "")
        if pair.keys() != {"A", "B"}:
            raise _mixed(adapter, f"{printable(module)} has a factor {''.join(pair)} alone")
        a, b = pair["A"].shape, pair["B"].shape
        if min(len(a), len(b)) < 2 or a[0] != b[1] or 0 in (*a, *b):
            shapes = " and ".join("x".join(map(str, shape)) or "a single number" for shape in (a, b))
            raise _mixed(adapter, f"{printable(module)} has factors A and B of {shapes}")
        if not config.target_parameters and a[0] != (rank := rank_of(config, module)):
            raise _mixed(adapter, f"{printable(module)} has rank {a[0]:,}, and {rank:,} in the configuration")
        if by_name and module not in found_modules:
            raise _mixed(adapter, f"{printable(module)} is not among the target_modules")


def rank_of(config: LoraConfig, module: str) -> int:
    """Return the rank of a module by the configuration."""
    patterns = config.rank_pattern or {}
    return int(patterns.get(get_pattern_key(patterns.keys(), module), config.r))


def _mixed(adapter: AdapterFiles, found: str) -> LoraError:
    return LoraError(
        f"{adapter.folder}: {CONFIG_FILE} and {ADAPTER_WEIGHTS} do not belong together: {found}",
        hint="restore both from one adapter",
    )
