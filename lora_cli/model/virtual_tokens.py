"""Run a model with virtual tokens before each row (prefix, prompt, p-tuning), made where the model is.

PEFT's forward makes their mask and their numbers on the CPU: at each batch, the host would wait for two copies.
"""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, PeftType
from torch import Tensor, cat

from lora_cli.model.device import to_device

BEFORE_EMBEDDINGS = {PeftType.PROMPT_TUNING, PeftType.P_TUNING}


def forward(model: PeftModel, inputs: Mapping[str, Any]) -> Any:
    """Return what PEFT's forward returns for `inputs`, keyword arguments of the base's forward with `input_ids`.

    They have no labels and no positions, which PEFT's forward changes too.
    """
    config, base = model.active_peft_config, model.get_base_model()
    is_prefix = config.peft_type == PeftType.PREFIX_TUNING
    if not is_prefix and config.peft_type not in BEFORE_EMBEDDINGS:
        return model(**inputs)
    given, ids = dict(inputs), inputs["input_ids"]
    numbers = model.prompt_tokens[model.active_adapter]
    if numbers.device != ids.device:
        model.prompt_tokens[model.active_adapter] = to_device(numbers, ids.device)
    masked = "decoder_attention_mask" if is_prefix and base.config.is_encoder_decoder else "attention_mask"
    if given.get(masked) is not None:
        given[masked] = _after(given[masked], config.num_virtual_tokens, value=1)
    if is_prefix and hasattr(model, "cls_layer_name"):  # a classifier may get the keys and values below its head
        return model._prefix_tuning_forward(**given, return_dict=True)
    prompts = model.get_prompt(len(ids))
    if is_prefix:
        return base(past_key_values=prompts, **given)
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = _after(given["token_type_ids"], config.num_virtual_tokens, value=0)
    embeddings = model.word_embeddings(given.pop("input_ids"))
    # Of an encoder-decoder, PEFT has prompts for the decoder too, and does not use them.
    prompts = prompts[:, : config.num_virtual_tokens].to(embeddings.dtype)
    return base(inputs_embeds=cat((prompts, embeddings), dim=1), **given)


def _after(values: Tensor, count: int, *, value: int) -> Tensor:
    """Return `values` [rows, length] after `count` columns of `value`."""
    return cat((values.new_full((len(values), count), value), values), dim=1)
