"""`lora chat`: chat with a base and its adapters, all on one loaded base; answers are streamed token by token."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.chat_templates import TEMPLATE_ERRORS
from lora_cli.errors import LoraError
from lora_cli.evaluation.generation import stop_ids
from lora_cli.model.base_model import BaseCheckpoint
from lora_cli.model.device import pick_device, pick_dtype
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.model_source import find_model, load_config, load_tokenizer
from lora_cli.model.saved_adapter import open_saved_adapter, read_adapter_config
from lora_cli.recipe.schema import ModelSpec, QuantizationSpec
from lora_cli.run import atomic, console
from lora_cli.training import cpu

BASE = "base"
HELP = """\
/use NAME    answer with an adapter          /base        answer with the base alone
/compare     base and adapter answer the last question
/reset       clear the conversation          /system TEXT  set the system message, and clear
/save FILE   write the conversation          /quit        leave"""


class ChatOptions(NamedTuple):
    """Options of answer generation."""

    temperature: float
    max_new_tokens: int
    system: str | None
    seed: int


class Chat:
    """A conversation with one loaded base and its adapters."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], options: ChatOptions
    ) -> None:
        """`names` are the adapters of `model`; the first one answers."""
        self._model, self._tokenizer, self._names, self._options = model, tokenizer, list(names), options
        self.active = names[0] if names else BASE
        self._system = options.system
        self.messages: list[dict[str, str]] = []
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._stop_ids = stop_ids(tokenizer, base, self._template_endings())
        self.reset()

    def reset(self) -> None:
        """Clear the conversation."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def handle_line(self, line: str) -> bool:
        """Handle one input line, a command or a question; return False to quit."""
        word, _, rest = line.strip().partition(" ")
        match word:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/help":
                console.info(HELP)
            case "/base":
                self._use(BASE)
            case "/use":
                self._use(rest.strip())
            case "/reset":
                self.reset()
            case "/system":
                self._system = rest.strip() or None
                self.reset()
            case "/save":
                self._save(rest.strip())
            case "/compare":
                self._compare()
            case _ if word.startswith("/"):
                console.info(f"{word} is not a command\n{HELP}")
            case _:
                question = {"role": "user", "content": line.strip()}
                try:
                    answer = self._answer(self.active, [*self.messages, question])
                except LoraError as error:
                    console.info(f"{error.message}; {error.hint}")
                else:
                    self.messages += [question, {"role": "assistant", "content": answer}]
        return True

    def _use(self, name: str) -> None:
        if name not in (BASE, *self._names):
            console.info(f"there is no adapter {name!r}; available: {', '.join([BASE, *self._names])}")
            return
        start = time.perf_counter()
        if name != BASE:
            self._model.set_adapter(name)
        self.active = name
        console.info(f"{name} answers now (switched in {(time.perf_counter() - start) * 1000:.0f} ms)")

    def _compare(self) -> None:
        """Answer the last question with the base and with the adapter; the conversation does not change."""
        questions = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            console.info("there is no question yet")
            return
        adapter = self.active if self.active != BASE else next(iter(self._names), None)
        for name in (BASE, *([adapter] if adapter else [])):
            sys.stdout.write(f"[{name}] ")
            self._answer(name, self.messages[: questions[-1] + 1])

    def _save(self, file: str) -> None:
        if not file or not Path(file).absolute().parent.is_dir():
            console.info("/save needs the name of a file, in a folder that exists")
            return
        atomic.write_json(Path(file), {"messages": self.messages})
        console.info(f"saved in {file}")

    @torch.no_grad()
    def _answer(self, name: str, messages: Sequence[dict[str, str]]) -> str:
        """Write the answer to stdout while it is generated, and return it. Ctrl-C ends it."""
        ids = torch.tensor([self._prompt_ids(messages)], device=next(self._model.parameters()).device)
        streamer = CollectingStreamer(self._tokenizer)
        options = self._options
        config = GenerationConfig(
            do_sample=options.temperature > 0,
            temperature=options.temperature or None,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=self._stop_ids or None,
            pad_token_id=self._stop_ids[0] if self._stop_ids else 0,
        )
        model: Any = self._model
        if isinstance(model, PeftModel) and name not in (BASE, model.active_adapter):
            model.set_adapter(name)
        adapter_off = model.disable_adapter() if isinstance(model, PeftModel) and name == BASE else nullcontext()
        try:
            with adapter_off:
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
                )
        except KeyboardInterrupt:
            console.info("\n(stopped)")
        sys.stdout.write("\n")
        sys.stdout.flush()
        return "".join(streamer.parts).strip()

    def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            plain: list[int] = self._tokenizer(text)["input_ids"]
            return plain
        try:
            encoded = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            raise LoraError(
                f"the chat template rejects this conversation: {error}", hint="change it with /system or /reset"
            ) from None
        ids: list[int] = encoded["input_ids"]
        return ids

    def _template_endings(self) -> list[list[int]]:
        """Return the token ids with which the chat template ends an answer, up to the first special token."""
        if self._tokenizer.chat_template is None:
            return []
        question = [{"role": "user", "content": "a"}]
        before = self._prompt_ids(question)
        full = self._tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "b"}])["input_ids"]
        special = set(self._tokenizer.all_special_ids)
        special |= {id_ for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        after = full[len(before) :] if full[: len(before)] == before else []
        first = next((number for number, id_ in enumerate(after) if id_ in special), None)
        return [after[: first + 1]] if first is not None else []


class CollectingStreamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Write an answer to stdout while it is generated, and collect it in `parts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text that will not change any more; called by transformers."""
        self.parts.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()


def chat(target: Path, *, adapters: Sequence[str], base_path: str | None, options: ChatOptions) -> None:
    """Answer stdin, line by line.

    Args:
        target: a run, adapter or model folder, or a .gguf file.
        adapters: further adapters of the same base, `DIR` or `NAME=DIR`.
        base_path: base in place of the one that the adapter names.
        options: of answer generation.

    Raises:
        LoraError: an adapter or model does not exist, does not fit its base, or is not a language model.
    """
    model, tokenizer, names = _load(target, adapters, base_path)
    conversation = Chat(model.eval(), tokenizer, names, options)
    torch.manual_seed(options.seed)
    if sys.stdin.isatty():
        console.info(f"{conversation.active} answers; /help lists the commands")
    for line in _lines(conversation):
        if not conversation.handle_line(line):
            break


def _lines(conversation: Chat) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - its import gives input() editing and history

    while True:
        try:
            yield input(f"{conversation.active}> ")
        except EOFError:
            console.info("")
            return


def _load(
    target: Path, adapters: Sequence[str], base_path: str | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, list[str]]:
    """Load the base of the first adapter with all adapters on it, or a model without adapters."""
    device = pick_device()
    if device.type == "cpu":
        cpu.set_up_cpu()
    if (target / "adapter" / "adapter_config.json").is_file():
        target = target / "adapter"
    folders = _adapter_folders(target, adapters)
    if not folders:
        base = _open_model(target, device)
        return base.load(device).model, base.tokenizer, []
    first = next(iter(folders.values()))
    adapter = open_saved_adapter(first, read_adapter_config(first), base_path=base_path, trust_remote_code=False)
    base = adapter.base
    if base.task != "causal-lm":
        raise LoraError(f"{first}: a model for {base.task} does not chat", hint="measure it with lora eval")
    section = adapter.trained_on.quantization if adapter.trained_on else None
    quantization = QuantizationSpec.model_validate(section) if section else None
    dtype = pick_dtype("auto", device, quantization) if adapter.trained_on is None else base.dtype
    loaded: PreTrainedModel | PeftModel = base.load(device, dtype=dtype, quantization=quantization).model
    for name, folder in folders.items():
        loaded = load_adapter(loaded, folder, base=base.name, name=name)
    upcast_trainable_params(loaded, for_inference=True)
    assert isinstance(loaded, PeftModel)
    loaded.set_adapter(next(iter(folders)))
    return loaded, base.tokenizer, list(folders)


def _open_model(target: Path, device: torch.device) -> BaseCheckpoint:
    dtype = pick_dtype("auto", device)
    source = find_model(ModelSpec(path=str(target)), dtype=dtype, device=device, info=console.info)
    config, tokenizer = load_config(source), load_tokenizer(source)
    return BaseCheckpoint(str(target), source, config, tokenizer, task="causal-lm", dtype=dtype)


def _adapter_folders(target: Path, adapters: Sequence[str]) -> dict[str, Path]:
    """Return the adapter folders by the names that /use accepts."""
    folders: dict[str, Path] = {}
    if (target / "adapter_config.json").is_file():
        folders["adapter"] = target
    elif not (target / "config.json").is_file() and target.suffix != ".gguf":
        raise LoraError(f"{target} is not a run, adapter or model", hint="give a folder of lora train or lora merge")
    elif adapters:
        raise LoraError("--adapter needs an adapter or a run as target", hint="write one of the adapters as the target")
    for item in adapters:
        name, _, path = item.rpartition("=")
        folder = Path(path)
        read_adapter_config(folder)
        name = name or folder.resolve().parent.name
        if name in (BASE, *folders):
            raise LoraError(f"--adapter {item}: the name {name} is taken", hint="give another: --adapter NAME=DIR")
        folders[name] = folder
    return folders
