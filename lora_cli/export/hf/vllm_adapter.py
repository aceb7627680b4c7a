"""`--to vllm`: the adapter as vLLM serves it beside its base, with the command that does.

What vLLM takes was read in its sources and its list of models, of 2025 and 2026; it was never run by this project, as
it needs a GPU. It scales every update by one alpha / rank (or alpha / sqrt(rank)) from the configuration, whatever
patterns are there, and says nothing of it: what PEFT scales otherwise is brought to one scale here, in B.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from lora_cli.errors import LoraError
from lora_cli.export.hf import peft_adapter
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import save_adapter
from lora_cli.model.load_adapter import PREFIX
from lora_cli.model.model_source import load_tokenizer

ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
ADAPTER_NAME = "default"  # PEFT's name for the only one
FACTOR_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?:(?:A|B)\.weight|embedding_(?:A|B))")
EXPORT_MERGED_HINT = "export the merged model: --to safetensors"
# Text models that vLLM's list of models marks as taking LoRA, of those that transformers has under the same name.
LORA_MODELS = """
    Afmoe Apertus Arcee Cohere Cohere2 Cohere2Moe Cwm DeepseekV2 DeepseekV3 DeepseekV32 Ernie4_5 Ernie4_5_Moe Exaone4
    FalconH1 GPTBigCode Gemma Gemma2 Gemma3 Gemma4 Glm Glm4 Glm4Moe Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe
    GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 Jamba Lfm2 Lfm2Moe Llama LongcatFlash MiniMaxM2
    Mistral Mixtral Nemotron NemotronH OPT Olmo Olmo2 Olmo3 OlmoHybrid Phi Phi3 Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe
    Qwen3Next SeedOss SmolLM3 Starcoder2 VaultGemma
"""
LORA_CLASSES = frozenset(f"{name}ForCausalLM" for name in LORA_MODELS.split())
EMBEDDINGS_AND_HEAD = ("embed_tokens", "lm_head")
LORA_EMBEDDING_CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
)  # LoRA on embeddings and head: vLLM's classes say which


class ScaledFactors(NamedTuple):
    """An update as PEFT computes it: scale · B A."""

    a: Tensor  # (rank, inputs)
    b: Tensor  # (outputs, rank)
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return int(self.a.shape[0])


class CommonScale(NamedTuple):
    """One rank and one scale for all updates, as vLLM has them."""

    rank: int
    scale: float  # alpha / rank


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """Method, what it trains beside LoRA, and the base's architecture.

    Raises:
        LoraError: vLLM would refuse it, or leave something out without a word.
    """
    if subject.task != "causal-lm":
        raise LoraError(
            f"--to vllm: {subject.name} is a {subject.task} adapter, whose head vLLM does not take from it",
            hint="export the merged model: --to safetensors, which vLLM serves where it knows the class",
        )
    config = _config(subject)
    if found := _unsupported_feature(config):
        raise LoraError(f"--to vllm: vLLM takes plain LoRA, and {subject.name} has {found}", hint=EXPORT_MERGED_HINT)
    peft_adapter.refuse(subject, options)
    kind = type(
        peft_adapter.attach_to_empty_base(subject, peft_adapter.adapter_folder(subject)).model.get_base_model()
    ).__name__
    if kind not in LORA_CLASSES:
        raise LoraError(
            f"--to vllm: {kind} is none of the text models that vLLM's list marks as taking LoRA",
            hint=f"{EXPORT_MERGED_HINT}; or, where your vLLM knows better, take the folder as it is: --to peft",
        )
    for key, _ in peft_adapter.iterate_tensors(peft_adapter.adapter_folder(subject)):
        match = FACTOR_KEY.fullmatch(key)
        if match is None:
            raise LoraError(
                f"--to vllm: vLLM has no place for {key}, which is more than LoRA's A and B of a layer",
                hint=EXPORT_MERGED_HINT,
            )
        if match["layer"].endswith(EMBEDDINGS_AND_HEAD) and kind not in LORA_EMBEDDING_CLASSES:
            raise LoraError(
                f"--to vllm: {match['layer']} is adapted, and vLLM is not known to take that in a {kind}",
                hint=EXPORT_MERGED_HINT,
            )
    if (rank := _rank(peft_adapter.adapter_folder(subject))) > ALLOWED_RANKS[-1]:
        raise LoraError(
            f"--to vllm: rank {rank}, and vLLM takes up to {ALLOWED_RANKS[-1]}",
            hint=f"make it smaller: lora adapter resize; or {EXPORT_MERGED_HINT}",
        )


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The folder `out`: a copy, or where vLLM would scale otherwise than PEFT, one with a single rank and scale."""
    peft_adapter.copy_adapter(subject, out)
    pairs = _factors(subject, peft_adapter.adapter_folder(subject))
    form = _common_scale(pairs, _config(subject))
    if form is None:
        return
    made = {}
    for key, value in peft_adapter.iterate_tensors(peft_adapter.adapter_folder(subject)):
        match = FACTOR_KEY.fullmatch(key)
        assert match is not None  # `refuse` saw to it
        pair = pairs[match["layer"]]
        made[key] = _rescale(key, value, form, ratio=pair.scale / form.scale, missing=form.rank - pair.rank)
    save_file(made, out / save_adapter.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((out / peft_adapter.CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"r": form.rank, "lora_alpha": form.scale * form.rank, "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    (out / peft_adapter.CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Read back: the adapter bit for bit, or each update the same product; then loaded by PEFT."""
    source = peft_adapter.adapter_folder(subject)
    expected, found = _factors(subject, source), _factors(subject, out)
    form = _common_scale(expected, _config(subject))
    if form is None:
        yield peft_adapter.check_equal_files(source, out)
        yield peft_adapter.check_loaded(subject, out)
    else:
        yield Check(
            "note", True, f"scales differ between layers: written as rank {form.rank}, the scales multiplied into B"
        )
        yield _equal_updates(expected, found)
    yield _scales(found, PeftConfig.from_pretrained(str(out)))


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """The command that serves it, and a request."""
    config = _config(subject)
    path = str(config.base_model_name_or_path)
    name = _name(subject)
    largest = min(allowed for allowed in ALLOWED_RANKS if allowed >= _rank(peft_adapter.adapter_folder(subject)))
    words = ["vllm", "serve", str(subject.folder) if path.endswith(".gguf") else path]
    words += ["--revision", config.revision] if config.revision and not Path(path).is_dir() else []
    words += ["--enable-lora", "--max-lora-rank", str(largest), "--lora-modules", f"{name}={out}"]
    # vLLM takes tokenizer and template from the base.
    words += ["--tokenizer", str(out)] if _has_own_tokenizer(subject) else []
    words += ["--trust-remote-code"] if subject.trust_remote_code else []
    asked: dict[str, Any] = {"model": name, "prompt": "Hello"}
    if subject.tokenizer.chat_template:
        asked = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    where = "chat/completions" if "messages" in asked else "completions"
    body = shlex.quote(json.dumps(asked))
    lines = [
        shlex.join(words),
        f"curl localhost:8000/v1/{where} -H 'Content-Type: application/json' -d {body}",
        "note: held against vLLM's rules as its sources have them; vLLM itself needs a GPU, and was not run",
    ]
    return lines + peft_adapter.quantization_note(subject)


def _config(subject: ExportSource) -> PeftConfig:
    return PeftConfig.from_pretrained(str(peft_adapter.adapter_folder(subject)))


def _unsupported_feature(config: PeftConfig) -> str | None:
    """What the adapter has that vLLM refuses, or does not know of; None for plain LoRA."""
    if not isinstance(config, LoraConfig) or str(config.peft_type.value) != "LORA":
        return f"the method {str(config.peft_type.value).lower().replace('_', ' ')}"
    # Experts and routers: of the first, vLLM has a form of its own for each model; the second it may pass over.
    listed = {
        "modules_to_save": config.modules_to_save,
        "target_parameters": config.target_parameters,
        "trained tokens": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": config.alora_invocation_tokens,
    }
    for what, value in listed.items():
        if value:
            return f"{what} ({', '.join(map(str, list(value)[:3]))})"
    flags = {
        "DoRA": config.use_dora,
        f"bias: {config.bias}": config.bias != "none",
        "lora_bias": config.lora_bias,
        "QALoRA": config.use_qalora,
        "block-diagonal LoRA": config.use_bdlora,
        "Arrow routing": config.arrow_config,
        "KaSA": config.kasa_config,
        "MonteCLoRA": config.monteclora_config,
        "tied embeddings adapted as one": config.ensure_weight_tying,
    }
    return next((what for what, given in flags.items() if given), None)


def _rank(folder: Path) -> int:
    """The largest rank in the file."""
    ends = ("lora_A.weight", "lora_embedding_A")
    return max(value.shape[0] for key, value in peft_adapter.iterate_tensors(folder) if key.endswith(ends))


def _factors(subject: ExportSource, folder: Path) -> dict[str, ScaledFactors]:
    """Each update of the adapter in `folder` as PEFT has it, in fp32, by the name of its layer."""
    found = {}
    for name, layer in peft_adapter.attach_to_empty_base(subject, folder).model.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER_NAME in layer.scaling:
            if ADAPTER_NAME in layer.lora_A:
                a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
            else:
                a, b = layer.lora_embedding_A[ADAPTER_NAME], layer.lora_embedding_B[ADAPTER_NAME]
            found[name.removeprefix(PREFIX)] = ScaledFactors(a.detach(), b.detach(), float(layer.scaling[ADAPTER_NAME]))
    return found


def _vllm_scale(config: PeftConfig) -> float:
    """What vLLM multiplies every update by."""
    assert isinstance(config, LoraConfig)
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))


def _common_scale(pairs: dict[str, ScaledFactors], config: PeftConfig) -> CommonScale | None:
    """What all updates are brought to; None where vLLM's scale is PEFT's for each of them."""
    if not _layers_with_other_scale(pairs, config):
        return None
    # The scale that most updates have, so that most tensors keep their values.
    scales = Counter(pair.scale for pair in pairs.values())
    return CommonScale(max(pair.rank for pair in pairs.values()), scales.most_common(1)[0][0])


def _layers_with_other_scale(pairs: dict[str, ScaledFactors], config: PeftConfig) -> list[str]:
    """The layers that vLLM would scale otherwise than PEFT."""
    scale = _vllm_scale(config)
    return [name for name, pair in pairs.items() if not math.isclose(pair.scale, scale, rel_tol=1e-12)]


def _rescale(key: str, value: Tensor, form: CommonScale, *, ratio: float, missing: int) -> Tensor:
    """A or B with `missing` more dimensions of zeros inside; B in fp32 where its own dtype would round the product."""
    if "lora_A" in key or "lora_embedding_A" in key:
        return pad(value, (0, 0, 0, missing)).contiguous()
    scaled = value.float() * ratio
    if torch.equal(scaled.to(value.dtype).float(), scaled):
        scaled = scaled.to(value.dtype)
    return pad(scaled, (0, missing)).contiguous()


def _equal_updates(expected: dict[str, ScaledFactors], found: dict[str, ScaledFactors]) -> Check:
    """Factor by factor: A the same with zeros below, scale · B the same with zeros beside, so the products are."""
    worst, where, strayed = 0.0, "", sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        old, new = expected[name], found[name]
        spare = new.rank - old.rank
        if spare < 0 or not torch.equal(new.a, pad(old.a, (0, 0, 0, spare))):
            strayed.append(name)
            continue
        ours, theirs = old.scale * pad(old.b, (0, spare)).double(), new.scale * new.b.double()
        off = float(((ours - theirs).abs() / ours.abs().clamp_min(1e-30)).max())
        if not off <= worst:
            worst, where = off, name
    passed = not strayed and worst <= 2 * torch.finfo(torch.float32).eps
    said = f"{len(found)} updates read back by PEFT, each scale·B·A that of the adapter within {worst:.0e}"
    said += f"; worst: {where}" if worst and not passed else ""
    said += f"; {len(strayed)} are others: {strayed[0]}" if strayed else ""
    return Check("updates", passed, said, {"updates": len(found), "worst": worst, "strayed": len(strayed)})


def _scales(found: dict[str, ScaledFactors], config: PeftConfig) -> Check:
    """What vLLM reads off the written configuration, against PEFT's scale of each layer."""
    other, rank = _layers_with_other_scale(found, config), max(pair.rank for pair in found.values())
    said = f"vLLM's one scale, {_vllm_scale(config):g}, is PEFT's of all {len(found)} layers; largest rank {rank}"
    if other:
        said = f"vLLM would scale {len(other)} of {len(found)} layers otherwise than PEFT: {other[0]}"
    return Check("scales", not other, said, {"layers": len(found), "other": len(other), "rank": rank})


def _name(subject: ExportSource) -> str:
    """What requests call it: the run's name, as far as it is safe in a command and a URL."""
    path = Path(subject.name)
    known = path.parent.name if path.name == "adapter" and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", known).strip("-.") or "adapter"


def _has_own_tokenizer(subject: ExportSource) -> bool:
    """Whether the adapter was trained with another tokenizer or chat template than its base's folder has."""
    if not (subject.folder / "tokenizer_config.json").is_file():
        return True
    words = load_tokenizer(subject.base.source)
    return bool(
        words.chat_template != subject.tokenizer.chat_template or words.get_vocab() != subject.tokenizer.get_vocab()
    )
