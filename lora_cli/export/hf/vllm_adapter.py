"""`--to vllm`: the adapter in the form that vLLM serves, and the command that serves it on its base.

Facts about vLLM are from its source code and its list of supported models (2025 and 2026). This project has never run
vLLM, which needs a GPU. vLLM scales every update by one alpha/rank (or alpha/sqrt(rank)) of the configuration; it
ignores alpha_pattern and rank_pattern silently. If PEFT's scales differ between layers, the adapter is rewritten with
one scale for all, and the ratio is multiplied into B.
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
from lora_cli.model.adapter_files import PREFIX, AdapterFiles, open_adapter
from lora_cli.model.model_source import load_tokenizer

ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
ADAPTER_NAME = "default"  # PEFT's name of a model's only adapter
FACTOR_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?:(?:A|B)\.weight|embedding_(?:A|B))")
EXPORT_MERGED_HINT = "export the merged model: --to safetensors"
# Text models that vLLM's list of models marks as supporting LoRA, if transformers has them under the same name.
LORA_MODELS = """
    Afmoe Apertus Arcee Cohere Cohere2 Cohere2Moe Cwm DeepseekV2 DeepseekV3 DeepseekV32 Ernie4_5 Ernie4_5_Moe Exaone4
    FalconH1 GPTBigCode Gemma Gemma2 Gemma3 Gemma4 Glm Glm4 Glm4Moe Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe
    GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 Jamba Lfm2 Lfm2Moe Llama LongcatFlash MiniMaxM2
    Mistral Mixtral Nemotron NemotronH OPT Olmo Olmo2 Olmo3 OlmoHybrid Phi Phi3 Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe
    Qwen3Next SeedOss SmolLM3 Starcoder2 VaultGemma
"""
# The same for models of text and images or sound; the adapter is on their language model.
MULTIMODAL_LORA_MODELS = """
    AudioFlamingo3 Blip2 Emu3 Gemma3 Glm4v Glm4vMoe GlmOcr GraniteSpeech HunYuanVL Idefics3 InternVL Lfm2Vl Llama4 Llava
    Mistral3 Qwen2VL Qwen2_5_VL Qwen3VL Qwen3VLMoe SmolVLM Voxtral
"""
LORA_CLASSES = frozenset(
    [f"{name}ForCausalLM" for name in LORA_MODELS.split()]
    + [f"{name}ForConditionalGeneration" for name in MULTIMODAL_LORA_MODELS.split()]
)
EMBEDDINGS_AND_HEAD = ("embed_tokens", "lm_head")
# Classes that, by vLLM's source code, support LoRA on embeddings and head.
LORA_EMBEDDING_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")


class ScaledFactors(NamedTuple):
    """The update of one layer as PEFT computes it: scale · B A."""

    a: Tensor  # [rank, in] fp32
    b: Tensor  # [out, rank] fp32
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return int(self.a.shape[0])


class CommonScale(NamedTuple):
    """The rank and scale of all updates in the rewritten adapter."""

    rank: int
    scale: float  # alpha / rank


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Check task, adapter method, other trained tensors, the base's architecture and the rank.

    Raises:
        LoraError: vLLM would reject the adapter, or ignore a part of it silently.
    """
    if source.task != "causal-lm":
        raise LoraError(
            f"--to vllm: {source.name} is a {source.task} adapter, and vLLM does not load heads from adapters",
            hint="export the merged model: --to safetensors, which vLLM serves if it supports the class",
        )
    config = _config(source)
    if feature := _unsupported_feature(config):
        raise LoraError(
            f"--to vllm: vLLM supports only plain LoRA, but {source.name} has {feature}", hint=EXPORT_MERGED_HINT
        )
    peft_adapter.check_supported(source, options)
    adapter = peft_adapter.adapter_files(source)
    class_name = type(peft_adapter.attach_to_empty_base(source, adapter).model.get_base_model()).__name__
    if class_name not in LORA_CLASSES:
        raise LoraError(
            f"--to vllm: {class_name} is not among the models that vLLM lists as supporting LoRA",
            hint=f"{EXPORT_MERGED_HINT}; if your version of vLLM supports it, export the folder unchanged: --to peft",
        )
    for key in sorted(adapter.tensors):
        match = FACTOR_KEY.fullmatch(key)
        if match is None:
            raise LoraError(
                f"--to vllm: vLLM does not load {key}, only LoRA's A and B of each layer",
                hint=EXPORT_MERGED_HINT,
            )
        if match["layer"].endswith(EMBEDDINGS_AND_HEAD) and class_name not in LORA_EMBEDDING_CLASSES:
            raise LoraError(
                f"--to vllm: {match['layer']} is adapted, which vLLM is not known to support in a {class_name}",
                hint=EXPORT_MERGED_HINT,
            )
    if (rank := _max_rank(adapter)) > ALLOWED_RANKS[-1]:
        raise LoraError(
            f"--to vllm: rank {rank} is above vLLM's maximum of {ALLOWED_RANKS[-1]}",
            hint=f"reduce it: lora adapter resize; or {EXPORT_MERGED_HINT}",
        )


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the adapter."""
    return source.adapter_bytes


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the folder `out`: a copy, or if vLLM's scale differs from PEFT's, tensors with a common rank and scale."""
    adapter = peft_adapter.adapter_files(source)
    peft_adapter.copy_adapter(source, out)
    updates = _scaled_factors(source, adapter)
    common = _common_scale(updates, _config(source))
    if common is None:
        return
    tensors = {}
    for key, value in peft_adapter.iterate_tensors(adapter):
        match = FACTOR_KEY.fullmatch(key)
        assert match is not None  # checked by `check_supported`
        update = updates[match["layer"]]
        tensors[key] = _rescale(key, value, ratio=update.scale / common.scale, extra_ranks=common.rank - update.rank)
    save_file(tensors, out / save_adapter.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    scale = {"r": common.rank, "lora_alpha": common.scale * common.rank, "use_rslora": False}
    peft_adapter.write_config(out, {**scale, "rank_pattern": {}, "alpha_pattern": {}})


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks: a copy read back bit for bit and loaded by PEFT, or rewritten updates compared with PEFT's.

    Raises:
        LoraError: PEFT cannot load the folder onto the base.
    """
    adapter, written = peft_adapter.adapter_files(source), open_adapter(out)
    expected, found = _scaled_factors(source, adapter), _scaled_factors(source, written)
    common = _common_scale(expected, _config(source))
    if common is None:
        yield peft_adapter.check_equal_files(adapter, written)
        yield peft_adapter.check_loaded(source, written)
    else:
        yield Check(
            "note", True, f"scales differ between layers: written with rank {common.rank}, scales multiplied into B"
        )
        yield _check_updates(expected, found)
    yield _check_scales(found, written.config)


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return the command that serves the adapter, a request to it, and notes."""
    config = _config(source)
    base_path = peft_adapter.base_argument(source)
    name = _served_name(source)
    max_rank = min(allowed for allowed in ALLOWED_RANKS if allowed >= _max_rank(peft_adapter.adapter_files(source)))
    command = ["vllm", "serve", base_path]
    command += ["--revision", config.revision] if config.revision and not Path(base_path).is_dir() else []
    command += ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", f"{name}={out}"]
    # vLLM uses the base's tokenizer and chat template.
    command += ["--tokenizer", str(out)] if _has_own_tokenizer(source) else []
    command += ["--trust-remote-code"] if source.trust_remote_code else []
    request: dict[str, Any] = {"model": name, "prompt": "Hello"}
    if source.tokenizer.chat_template:
        request = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    endpoint = "chat/completions" if "messages" in request else "completions"
    body = shlex.quote(json.dumps(request))
    lines = [
        shlex.join(command),
        f"curl localhost:8000/v1/{endpoint} -H 'Content-Type: application/json' -d {body}",
        "note: checked against the rules in vLLM's source code; not run in vLLM, which needs a GPU",
    ]
    return lines + peft_adapter.quantization_note(source)


def _config(source: ExportSource) -> PeftConfig:
    return peft_adapter.adapter_files(source).config


def _unsupported_feature(config: PeftConfig) -> str | None:
    """Return a feature of the adapter that vLLM rejects or ignores; None for plain LoRA."""
    if not isinstance(config, LoraConfig) or str(config.peft_type.value) != "LORA":
        return f"the method {str(config.peft_type.value).lower().replace('_', ' ')}"
    lists = {
        "modules_to_save": config.modules_to_save,
        # Expert weights: vLLM has a format of its own for each model. It may skip adapted routers.
        "target_parameters": config.target_parameters,
        "trained tokens": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": config.alora_invocation_tokens,
    }
    for name, value in lists.items():
        if value:
            names = sorted(map(str, value))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"{name} ({', '.join(names[:3])}{more})"
    flags = {
        "DoRA": config.use_dora,
        f"bias: {config.bias}": config.bias != "none",
        "lora_bias": config.lora_bias,
        "QALoRA": config.use_qalora,
        "block-diagonal LoRA": config.use_bdlora,
        "Arrow routing": config.arrow_config,
        "KaSA": config.kasa_config,
        "MonteCLoRA": config.monteclora_config,
        "adapters shared by tied embeddings (ensure_weight_tying)": config.ensure_weight_tying,
    }
    return next((name for name, value in flags.items() if value), None)


def _max_rank(adapter: AdapterFiles) -> int:
    """Return the largest rank in the adapter file."""
    suffixes = ("lora_A.weight", "lora_embedding_A")
    return max(stored.shape[0] for key, stored in adapter.tensors.items() if key.endswith(suffixes))


def _scaled_factors(source: ExportSource, adapter: AdapterFiles) -> dict[str, ScaledFactors]:
    """Load an adapter by PEFT, and return each update by the name of its layer."""
    result = {}
    for name, layer in peft_adapter.attach_to_empty_base(source, adapter).model.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER_NAME in layer.scaling:
            if ADAPTER_NAME in layer.lora_A:
                a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
            else:
                a, b = layer.lora_embedding_A[ADAPTER_NAME], layer.lora_embedding_B[ADAPTER_NAME]
            scale = float(layer.scaling[ADAPTER_NAME])
            result[name.removeprefix(PREFIX)] = ScaledFactors(a.detach(), b.detach(), scale)
    return result


def _vllm_scale(config: PeftConfig) -> float:
    """Return the factor by which vLLM multiplies every update."""
    assert isinstance(config, LoraConfig)
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))


def _common_scale(updates: dict[str, ScaledFactors], config: PeftConfig) -> CommonScale | None:
    """Return the rank and scale to rewrite all updates with; None if vLLM's scale is PEFT's in every layer."""
    if not _layers_with_other_scale(updates, config):
        return None
    # The most frequent scale, so that most tensors keep their values.
    scales = Counter(update.scale for update in updates.values())
    return CommonScale(max(update.rank for update in updates.values()), scales.most_common(1)[0][0])


def _layers_with_other_scale(updates: dict[str, ScaledFactors], config: PeftConfig) -> list[str]:
    """Return the layers whose scale in PEFT differs from vLLM's."""
    scale = _vllm_scale(config)
    return [name for name, update in updates.items() if not math.isclose(update.scale, scale, rel_tol=1e-12)]


def _rescale(key: str, value: Tensor, *, ratio: float, extra_ranks: int) -> Tensor:
    """Pad A or B with zeros to a larger rank, and multiply B by `ratio`, in fp32 if its own dtype would round it."""
    if "lora_A" in key or "lora_embedding_A" in key:
        return pad(value, (0, 0, 0, extra_ranks)).contiguous()
    scaled = value.float() * ratio
    if torch.equal(scaled.to(value.dtype).float(), scaled):
        scaled = scaled.to(value.dtype)
    return pad(scaled, (0, extra_ranks)).contiguous()


def _check_updates(expected: dict[str, ScaledFactors], found: dict[str, ScaledFactors]) -> Check:
    """Compare A and scale · B of each layer, padded with zeros to the same rank: then the products are equal too."""
    max_error, worst, mismatched = 0.0, "", sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        old, new = expected[name], found[name]
        extra_ranks = new.rank - old.rank
        if extra_ranks < 0 or not torch.equal(new.a, pad(old.a, (0, 0, 0, extra_ranks))):
            mismatched.append(name)
            continue
        ours, theirs = old.scale * pad(old.b, (0, extra_ranks)).double(), new.scale * new.b.double()
        error = float(((ours - theirs).abs() / ours.abs().clamp_min(1e-30)).max())
        if not error <= max_error:
            max_error, worst = error, name
    passed = not mismatched and max_error <= 2 * torch.finfo(torch.float32).eps
    text = f"{len(found)} updates read back by PEFT, each scale·B·A equal to the adapter's within {max_error:.0e}"
    text += f"; largest difference in {worst}" if worst and not passed else ""
    text += f"; {len(mismatched)} differ: {mismatched[0]}" if mismatched else ""
    return Check("updates", passed, text, {"updates": len(found), "worst": max_error, "strayed": len(mismatched)})


def _check_scales(found: dict[str, ScaledFactors], config: PeftConfig) -> Check:
    """Compare the scale that vLLM computes from the written configuration with PEFT's scale of each layer."""
    different, rank = _layers_with_other_scale(found, config), max(update.rank for update in found.values())
    text = f"vLLM's scale, {_vllm_scale(config):g}, is PEFT's in all {len(found)} layers; largest rank {rank}"
    if different:
        text = f"vLLM's scale differs from PEFT's in {len(different)} of {len(found)} layers: {different[0]}"
    return Check("scales", not different, text, {"layers": len(found), "other": len(different), "rank": rank})


def _served_name(source: ExportSource) -> str:
    """Return the adapter's name in requests: that of the run, without characters that are unsafe in a shell or URL."""
    path = Path(source.name)
    name = path.parent.name if path.name == "adapter" and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "adapter"


def _has_own_tokenizer(source: ExportSource) -> bool:
    """Return whether the adapter's tokenizer or chat template differs from that in the base's folder."""
    if not (source.folder / "tokenizer_config.json").is_file():
        return True
    tokenizer = load_tokenizer(source.base.source)
    return bool(
        tokenizer.chat_template != source.tokenizer.chat_template
        or tokenizer.get_vocab() != source.tokenizer.get_vocab()
    )
