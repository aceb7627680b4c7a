"""`lora adapter convert`: an adapter of mlx-lm, LitGPT, torchtune or pickled PEFT becomes a verified PEFT folder."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli.data.check_template import check_template_files
from lora_cli.data.class_labels import LABELS_FILE
from lora_cli.errors import LoraError
from lora_cli.model import empty_base
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.empty_base import EmptyModel
from lora_cli.model.foreign_adapters.detect import TOOLS, Found
from lora_cli.model.foreign_adapters.pickled_peft import PickledPeft
from lora_cli.model.foreign_adapters.readers import READERS
from lora_cli.model.foreign_adapters.source_adapter import Base, SourceAdapter
from lora_cli.model.foreign_adapters.to_peft import TOLERANCE, compare_with_source, to_peft
from lora_cli.model.save_adapter import ADAPTER_WEIGHTS, TOKENIZER_FILES, sets_in_order
from lora_cli.model.saved_adapter import SavedAdapter, find_base
from lora_cli.run import console
from lora_cli.run.checksums import verified_folder
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.folder import CONFIG_FILE
from lora_cli.run.redact import redact_path
from lora_cli.run.shell import shell_path
from lora_cli.run.workspace import remove_leftovers


class Conversion(NamedTuple):
    """What was converted; the field names are the keys of the JSON output."""

    out: str
    source: str
    tool: str  # as in --from
    base: str
    method: str  # lora, dora, or PEFT's name of another one
    modules: int
    ranks: list[int]  # of the modules, without repetition
    scales: list[float]  # that the updates are multiplied by, without repetition
    parameters: int
    tensors_read: int
    tensors_written: int
    largest_difference: float  # of an update from the source's, relative to the update
    notes: list[str]


def convert(found: Found, *, out: Path, base_path: str | None, force: bool) -> dict[str, Any]:
    """Convert an adapter of another tool, and prove that what PEFT loads from the result is the source's update.

    Args:
        found: the adapter.
        out: folder of the converted adapter.
        base_path: base in place of the one that the adapter names: a folder or hub id that transformers loads.
        force: replace `out` if it exists.

    Returns:
        The document of --json: the fields of `Conversion`.

    Raises:
        LoraError: the adapter is damaged, does not fit the base, or cannot be expressed in PEFT exactly.
    """
    remove_leftovers(out.absolute().parent, out.name)  # of a command that was killed
    source = READERS[found.tool](found)
    done = (
        _convert_pickled(source, out, base_path, force)
        if isinstance(source, PickledPeft)
        else _convert_updates(found, source, out, base_path, force)
    )
    for note in done.notes:
        console.info(f"note: {note}")
    console.info(
        f"{done.tensors_read:,} tensors read, and all used; {done.tensors_written:,} written, read back and loaded by "
        f"PEFT: the largest difference of an update is {done.largest_difference:.1e} of its size"
    )
    console.out.print(_describe(done))
    console.out.print(done.out)
    return done._asdict()


def _describe(done: Conversion) -> str:
    name = {"lora": "LoRA", "dora": "DoRA"}.get(done.method, done.method)
    sizes = ""
    if done.ranks:
        ranks, scales = (", ".join(f"{each:g}" for each in values) for values in (done.ranks, done.scales))
        sizes = f"{done.modules:,} modules, rank {ranks}, scale {scales}, "
    return f"{name} of {TOOLS[done.tool].name} on {done.base}: {sizes}{done.parameters:,} parameters"


def _convert_updates(found: Found, source: SourceAdapter, out: Path, base_path: str | None, force: bool) -> Conversion:
    name = base_path or source.base
    if name is None:
        raise LoraError(f"{found.folder} names no base", hint="name it with --base")
    saved = _find_base(found, name, named=base_path is not None)
    base = Base(name, saved.base.skeleton())
    updates = source.place(base)
    converted = to_peft(updates, base, dropout=source.dropout)
    loaded_difference = 0.0

    def verify(loaded: EmptyModel) -> None:
        nonlocal loaded_difference
        loaded_difference = compare_with_source(updates, loaded)
        if not loaded_difference <= TOLERANCE:
            raise LoraError(
                f"the converted adapter differs from {source.file} by {loaded_difference:.3g} of an update",
                hint="this is a bug of lora: nothing was written",
                exit_code=1,
            )

    notes = list(source.notes)
    if source.base is not None and source.base != name:
        notes.append(
            f"trained on {source.base}, and converted for {name}: where their weights differ (by quantization, for "
            "example), the outputs do too"
        )
    _write(out, converted.config, converted.tensors, name=name, replace=force, source=source.file, verify=verify)
    scales = {update.pieces[0].scale for update in updates}
    return Conversion(
        str(out),
        str(source.file),
        found.tool,
        name,
        "dora" if converted.config.use_dora else "lora",
        len(updates),
        sorted(set(converted.ranks.values())),
        sorted(scales),
        sum(tensor.numel() for tensor in converted.tensors.values()),
        source.tensors,
        len(converted.tensors),
        loaded_difference,
        notes,
    )


def _find_base(found: Found, name: str, *, named: bool) -> SavedAdapter:
    """Find the base by its name.

    Raises:
        LoraError: it cannot be found, or has a format of mlx-lm that transformers does not load.
    """
    config = LoraConfig(base_model_name_or_path=name, task_type="CAUSAL_LM")
    stub = AdapterFiles(found.folder, config, {}, None, None, None)
    saved = find_base(stub, path=name if named else None, trust_remote_code=False)
    quantization = getattr(saved.base.config, "quantization", None)
    if isinstance(quantization, dict) and "bits" in quantization:
        raise LoraError(
            f"{name} is quantized by mlx-lm, which transformers does not load",
            hint="name the model that it was made from with --base",
        )
    return saved


def _convert_pickled(source: PickledPeft, out: Path, base_path: str | None, force: bool) -> Conversion:
    folder, config = source.file.parent, source.config
    check_template_files(folder)  # copied into the result
    name = base_path or config.base_model_name_or_path
    if not name:
        raise LoraError(f"{folder}: adapter_config.json names no base", hint="name it with --base")

    scales: set[float] = set()

    def verify(loaded: EmptyModel) -> None:
        """Read the scales: names and shapes were compared by PEFT, and the values are bit for bit."""
        layers = (layer for layer in loaded.model.modules() if isinstance(layer, LoraLayer))
        scales.update(scale for layer in layers for scale in layer.scaling.values())

    _write(
        out, config, source.tensors, name=name, replace=force, source=source.file, verify=verify,
        copied=(LABELS_FILE, *TOKENIZER_FILES),
    )  # fmt: skip
    lora = config if isinstance(config, LoraConfig) else None
    ranks = sorted({t.shape[0] for key, t in source.tensors.items() if key.endswith("lora_A.weight")}) if lora else []
    return Conversion(
        str(out),
        str(source.file),
        "bin",
        name,
        "dora" if lora and lora.use_dora else str(config.peft_type.value).lower(),
        len({key.rpartition(".lora_")[0] for key in source.tensors if ".lora_" in key}),
        ranks,
        sorted(scales) if ranks else [],
        sum(tensor.numel() for tensor in source.tensors.values()),
        len(source.tensors),
        len(source.tensors),
        0.0,
        [f"{CONFIG_FILE} has no {key}: PEFT's default is {getattr(config, key)}" for key in source.missing],
    )


def _write(
    out: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    replace: bool,
    source: Path,
    verify: Callable[[EmptyModel], None],
    copied: tuple[str, ...] = (),
) -> None:
    """Write the folder, load it by PEFT onto the base without weights, and move it to its place if all is equal.

    Raises:
        LoraError: PEFT does not load it, or a tensor differs.
    """
    config.base_model_name_or_path = redact_path(name)
    if redact_path(name) != name:
        console.info(
            f"note: {out} names its base {redact_path(name)}, without its folder: use it with --base {shell_path(name)}"
        )
    check_free_space([Need(out, sum(tensor.nbytes for tensor in tensors.values()), "the adapter")])
    with verified_folder(out, kind="adapter", published=True, replace=replace) as partial:
        save_file(dict(tensors), partial / ADAPTER_WEIGHTS, {"format": "pt"})
        with sets_in_order(config):
            config.save_pretrained(str(partial))
        for file in copied:
            if (source.parent / file).is_file():
                shutil.copyfile(source.parent / file, partial / file)
        (partial / "README.md").write_text(_model_card(name), encoding="utf-8")
        try:
            files = open_adapter(partial)
            named = files.config.base_model_name_or_path
            saved = find_base(files, path=None if named == name else name, trust_remote_code=False)
            model = empty_base.init_empty_weights(saved.base.skeleton())
            loaded = empty_base.attach_saved_adapter(model, files, base=name)
        except LoraError as error:
            raise _about_source(error, partial, source) from None
        verify(loaded)
        written: Mapping[str, Any] = load_file(partial / ADAPTER_WEIGHTS)
        for key, tensor in tensors.items():
            if written[key].dtype != tensor.dtype or not written[key].equal(tensor):
                raise LoraError(f"{key} was not written as it is", hint="this is a bug of lora", exit_code=1)


def _about_source(error: LoraError, partial: Path, source: Path) -> LoraError:
    """Return an error about what was written as one about the source, whose mistakes it has, too."""

    def renamed(text: str) -> str:
        return text.replace(str(partial), str(source.parent)).replace(ADAPTER_WEIGHTS, source.name)

    hint = error.hint and renamed(error.hint)
    return LoraError(renamed(error.message), hint=hint, details=error.details, exit_code=error.exit_code)


def _model_card(base: str) -> str:
    name = Path(base).name
    return f"---\nbase_model: {name}\nlibrary_name: peft\n---\n# LoRA of {name}\n\nA plain PEFT adapter, converted.\n"
