"""Multimodal bases trained on text: their vision towers, audio towers and projectors, which text never reaches."""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Words in the names of modules that process images, video or sound.
VISION = "vision|visual|image|img|video|vit|vqmodel"
MODALITY = re.compile(rf"(^|_)({VISION}|audio|speech)(_|\d|$)")
AUDIO = re.compile(r"(^|_)(audio|speech)(_|\d|$)")
PROJECTOR = re.compile(r"projector|projection|connector|resampler|qformer|(^|_)(embed|proj|merger|aligner)(_|$)")
# Files of image, video and sound processors, which a model folder has next to its tokenizer.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Keys of configs that give the ids of tokens that stand for an image, a video or a sound.
PLACEHOLDER_KEYS = re.compile(
    r"(image|video|audio|vision|img|boi|eoi|boa|eoa)(_(begin|end|start|newline|patch|pad|soft))?_(token_(id|index)|token)$"
)


class OutsideText(NamedTuple):
    """A module of a multimodal model that text does not pass through."""

    kind: str  # vision tower, audio tower, projector or cross-attention
    name: str  # full name in the model


def outside_text(model: PreTrainedModel) -> list[OutsideText]:
    """Return the modules of a multimodal model that text does not pass through; empty for a text model.

    They are the modules next to the text decoder (`get_decoder()`), modules inside it that are named after another
    modality, and layers that attend to images only.
    """
    if not is_multimodal(model.config):
        return []
    decoder = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    path = names.get(id(decoder), "")
    found: dict[str, OutsideText] = {}

    def add(name: str, kind: str) -> None:
        if not is_inside(name, found):
            found[name] = OutsideText(kind, name)

    head = model.get_output_embeddings()
    for name, module, is_top in _siblings(model, path):
        # Next to the base model are the heads: the output head, or a classifier's.
        is_head = is_top and (head is None or any(inner is head for inner in module.modules()))
        if not is_head or MODALITY.search(name.rpartition(".")[2]):
            add(name, _kind(name.rpartition(".")[2]))
    for name, _ in decoder.named_modules():
        if MODALITY.search(name.rpartition(".")[2]):
            full_name = f"{path}.{name}" if path else name
            add(full_name, _kind(name.rpartition(".")[2]))
    for number in getattr(model.config.get_text_config(), "cross_attention_layers", None) or ():
        name = f"{path}.layers.{number}" if path else f"layers.{number}"
        if hasattr(getattr(decoder, "layers", [None] * (number + 1))[number], "cross_attn"):
            add(name, "cross-attention to images")
    return list(found.values())


def text_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the parameters that text passes through, each with its name in the text model alone.

    `model.language_model.layers.0.mlp.up_proj.weight` is `model.layers.0.mlp.up_proj.weight` there. The names of a text
    model do not change. A parameter that is tied to another has both names.
    """
    towers = [part.name for part in outside_text(model)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if not is_inside(name, towers)]
    if not towers:
        return {name: name for name in names}
    path = next(name for name, module in model.named_modules() if module is model.get_decoder())
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    return {
        name: name.replace(f"{path}.", "model.", 1) if is_inside(name, [path]) else name.replace(head, "lm_head", 1)
        for name in names
    }


def is_multimodal(config: PretrainedConfig) -> bool:
    """Return whether `config` describes a model of text and of images, video or sound."""
    if config.is_encoder_decoder:
        return False
    return config.get_text_config() is not config or any(
        MODALITY.search(key) and isinstance(value, (dict, PretrainedConfig)) for key, value in vars(config).items()
    )


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return whether the module or parameter `name` is one of `modules` or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def outside_layers(
    outside: Sequence[OutsideText], layers: Mapping[str, nn.Module]
) -> Iterator[tuple[OutsideText, list[str]]]:
    """Yield each module with the names of the linear `layers` that are inside it, if it has any."""
    for part in outside:
        inside = [name for name in layers if is_inside(name, [part.name])]
        if inside:
            yield part, inside


def describe_outside(outside: Sequence[OutsideText], layers: Mapping[str, nn.Module]) -> list[str]:
    """Return a line for each kind of module outside the text decoder, with its number of linear `layers`."""
    counts: dict[str, list[tuple[str, int]]] = {}
    for part, inside in outside_layers(outside, layers):
        counts.setdefault(part.kind, []).append((part.name, len(inside)))
    lines = []
    for kind, parts in counts.items():
        names = ", ".join(name for name, _ in parts[:2]) + (f" and {len(parts) - 2} more" if len(parts) > 2 else "")
        total = sum(count for _, count in parts)
        lines.append(f"  {kind}: {total} layer{'s' * (total > 1)}, frozen, not in the adapter ({names})")
    return lines


def placeholder_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokenizer's control tokens that stand for an image, a video or a sound, sorted."""
    if not is_multimodal(config):
        return []
    ids = {
        value
        for key, value in vars(config).items()
        if PLACEHOLDER_KEYS.search(key) and isinstance(value, int) and not isinstance(value, bool)
    }
    return sorted(ids & tokenizer.added_tokens_decoder.keys())


def _siblings(model: PreTrainedModel, path: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield name and module of all modules next to those of `path`, and whether each is a child of the model."""
    parent: nn.Module = model
    prefix = ""
    for part in path.split(".") if path else []:
        for name, module in parent.named_children():
            if name != part:
                yield f"{prefix}{name}", module, parent is model
        parent = parent.get_submodule(part)
        prefix += f"{part}."


def _kind(name: str) -> str:
    if PROJECTOR.search(name):
        return "projector"
    if AUDIO.search(name):
        return "audio tower"
    return "vision tower" if MODALITY.search(name) else "other part"


def copy_processor_files(source: Path, out: Path) -> None:
    """Copy the files of the image, video and sound processors from one model folder to another; no error without any.

    A processor's chat template is not among them: the tokenizer has it, see `model_source.load_tokenizer`.
    """
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
