"""`lora chat`: talk to a base and its adapters, all on one loaded base, an answer token by token."""

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

from lora_cli.errors import LoraError
from lora_cli.evaluation.generation import stop_ids
from lora_cli.model import base_model, fp32_weights
from lora_cli.model.load_adapter import load_adapter
from lora_cli.recipe.schema import ModelSpec, QuantizationSpec
from lora_cli.run import atomic, console
from lora_cli.setup.saved_adapter import open_saved_adapter, read_config
from lora_cli.training import cpu

BASE = "base"
HELP = """\
/use NAME    answer with an adapter          /base        answer with the base alone
/compare     base and adapter on the last question
/reset       forget the conversation         /system TEXT  set the system message, and forget
/save FILE   write the conversation          /quit        leave"""


class ChatOptions(NamedTuple):
    """How answers are made."""

    temperature: float
    max_new_tokens: int
    system: str | None
    seed: int


class Chat:
    """A conversation with one loaded base. A class: what was said outlives a line."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], options: ChatOptions
    ) -> None:
        """`names` are the adapters that `model` has, the first of which answers."""
        self._model, self._tokenizer, self._names, self._options = model, tokenizer, list(names), options
        self.active = names[0] if names else BASE
        self._system = options.system
        self.messages: list[dict[str, str]] = []
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._stop = stop_ids(tokenizer, inner, self._ends())
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def hear(self, line: str) -> bool:
        """Do what a line says: a command, or a question to answer. False where it says goodbye."""
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
                console.info(f"{word} is no command\n{HELP}")
            case _:
                self.messages.append({"role": "user", "content": line.strip()})
                self.messages.append({"role": "assistant", "content": self._answer(self.active, self.messages)})
        return True

    def _use(self, name: str) -> None:
        if name not in (BASE, *self._names):
            console.info(f"there is no adapter {name!r}; there are {', '.join([BASE, *self._names])}")
            return
        began = time.perf_counter()
        if name != BASE:
            self._model.set_adapter(name)
        self.active = name
        console.info(f"{name} answers now (switched in {(time.perf_counter() - began) * 1000:.0f} ms)")

    def _compare(self) -> None:
        """The last question, to the base and to the adapter; the conversation stays as it was."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            console.info("nothing was asked yet")
            return
        adapter = self.active if self.active != BASE else next(iter(self._names), None)
        for name in (BASE, *([adapter] if adapter else [])):
            sys.stdout.write(f"[{name}] ")
            self._answer(name, self.messages[: asked[-1] + 1])

    def _save(self, file: str) -> None:
        if not file or not Path(file).absolute().parent.is_dir():
            console.info("/save needs the name of a file, in a folder that is there")
            return
        atomic.write_json(Path(file), {"messages": self.messages})
        console.info(f"saved in {file}")

    @torch.no_grad()
    def _answer(self, name: str, messages: Sequence[dict[str, str]]) -> str:
        """Write the answer to stdout as it comes, and return it. Ctrl-C ends it where it is."""
        ids = torch.tensor([self._prompt(messages)], device=next(self._model.parameters()).device)
        heard = CollectingStreamer(self._tokenizer)
        options = self._options
        config = GenerationConfig(
            do_sample=options.temperature > 0,
            temperature=options.temperature or None,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=self._stop or None,
            pad_token_id=self._stop[0] if self._stop else 0,
        )
        model: Any = self._model
        if isinstance(model, PeftModel) and name not in (BASE, model.active_adapter):
            model.set_adapter(name)
        without = model.disable_adapter() if isinstance(model, PeftModel) and name == BASE else nullcontext()
        try:
            with without:
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=heard
                )
        except KeyboardInterrupt:
            console.info("\n(stopped)")
        sys.stdout.write("\n")
        sys.stdout.flush()
        return "".join(heard.parts).strip()

    def _prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            plain: list[int] = self._tokenizer(text)["input_ids"]
            return plain
        ids: list[int] = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"]
        return ids

    def _ends(self) -> list[list[int]]:
        """How the template ends an answer, cut at the first special token, as a reference that `stop_ids` reads."""
        if self._tokenizer.chat_template is None:
            return []
        asked = [{"role": "user", "content": "a"}]
        before = self._prompt(asked)
        whole = self._tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "b"}])["input_ids"]
        special = set(self._tokenizer.all_special_ids)
        special |= {id_ for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        after = whole[len(before) :] if whole[: len(before)] == before else []
        first = next((number for number, id_ in enumerate(after) if id_ in special), None)
        return [after[: first + 1]] if first is not None else []


class CollectingStreamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Writes an answer to stdout as it grows, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece that will not change any more."""
        self.parts.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()


def chat(target: Path, *, adapters: Sequence[str], base_path: str | None, options: ChatOptions) -> None:
    """Answer what stdin says, line by line."""
    model, tokenizer, names = _load(target, adapters, base_path)
    talk = Chat(model.eval(), tokenizer, names, options)
    torch.manual_seed(options.seed)
    if sys.stdin.isatty():
        console.info(f"{talk.active} answers; /help lists the commands")
    for line in _lines(talk):
        if not talk.hear(line):
            break


def _lines(talk: Chat) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - its import gives input() editing and history

    while True:
        try:
            yield input(f"{talk.active}> ")
        except EOFError:
            console.info("")
            return


def _load(
    target: Path, named: Sequence[str], base_path: str | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, list[str]]:
    """The base of the first adapter with all adapters on it, or a whole model."""
    device = base_model.pick_device()
    if device.type == "cpu":
        cpu.set_up_cpu()
    if (target / "adapter" / "adapter_config.json").is_file():
        target = target / "adapter"
    folders = _folders(target, named)
    if not folders:
        spec = ModelSpec(path=str(target))
        dtype = base_model.pick_dtype("auto", device)
        source = base_model.find_model(spec, dtype=dtype, device=device, info=console.info)
        model = base_model.load_base(source, dtype=dtype, device=device).model
        return model, base_model.load_tokenizer(source), []
    first = next(iter(folders.values()))
    subject = open_saved_adapter(first, read_config(first), base_path=base_path, trust_remote_code=False)
    if subject.task != "causal-lm":
        raise LoraError(f"{first}: a model for {subject.task} does not chat", hint="measure it with lora eval")
    section = subject.trained_on.quantization if subject.trained_on else None
    quantization = QuantizationSpec.model_validate(section) if section else None
    dtype = base_model.pick_dtype("auto", device, quantization) if subject.trained_on is None else subject.dtype
    loaded: PreTrainedModel | PeftModel = base_model.load_base(
        subject.source, dtype=dtype, device=device, quantization=quantization, vocabulary=subject.vocabulary
    ).model
    for name, folder in folders.items():
        loaded = load_adapter(loaded, folder, base=subject.base, name=name)
    fp32_weights.upcast_trainable_params(loaded)
    assert isinstance(loaded, PeftModel)
    loaded.set_adapter(next(iter(folders)))
    return loaded, subject.tokenizer, list(folders)


def _folders(target: Path, named: Sequence[str]) -> dict[str, Path]:
    """Adapter folders by the names that /use takes."""
    found: dict[str, Path] = {}
    if (target / "adapter_config.json").is_file():
        found["adapter"] = target
    elif not (target / "config.json").is_file() and target.suffix != ".gguf":
        raise LoraError(f"{target} is no run, adapter or model", hint="give a folder of lora train or lora merge")
    elif named:
        raise LoraError("--adapter goes with an adapter or a run", hint="name one of the adapters first")
    for item in named:
        name, _, path = item.rpartition("=")
        folder = Path(path)
        read_config(folder)
        name = name or folder.resolve().parent.name
        if name in (BASE, *found):
            raise LoraError(f"--adapter {item}: the name {name} is taken", hint="give another: --adapter NAME=DIR")
        found[name] = folder
    return found
