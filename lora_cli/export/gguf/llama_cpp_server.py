"""llama.cpp in a process of its own: it aborts on what it does not like, and would take this one along. No torch.

The child holds xllamacpp's server, which listens on the loopback interface at a port of the system's choice; the
parent asks it what llama.cpp's own HTTP clients ask. Attention is computed plainly and the cache kept in fp32, so that
what differs from transformers is the file's weights and nothing else. Run on the CPU alone: never on a GPU by this
project.
"""

import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.errors import LoraError

ANSWER_TIMEOUT_S = 600  # seconds without an answer after which llama.cpp is given up


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, address: str, vocabulary: int) -> None:
        self._address, self._vocabulary = address, vocabulary

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of `text` in which special tokens are read as such; `add_special` as llama.cpp adds BOS and EOS."""
        asked = {"content": text, "add_special": add_special, "parse_special": True}
        tokens: list[int] = self._post("/tokenize", asked)["tokens"]
        return tokens

    def chat_prompt(self, chat: Sequence[Mapping[str, str]]) -> str:
        """The prompt that the file's chat template makes of `chat`, up to where the assistant begins.

        Raises:
            LoraError: the template refuses it.
        """
        prompt: str = self._post("/apply-template", {"messages": list(chat), "add_generation_prompt": True})["prompt"]
        return prompt

    def logprobs(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Log-probabilities (vocabulary,) of the token after `tokens`, in nats."""
        # They are of the logits as computed, whatever is sampled; but a token that ends generation, or is part of a
        # character, would come without any.
        plain = self.tokenize("a")[-1]
        answer = self._complete(tokens, 1, n_probs=self._vocabulary, logit_bias=[[plain, 10_000.0]])
        found = np.full(self._vocabulary, -np.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def continue_greedily(self, tokens: Sequence[int], *, longest: int) -> tuple[tuple[int, ...], bool]:
        """The most likely token after `tokens`, again and again, up to `longest` or a token that ends generation.

        Returns the tokens, without that one, and whether it came.
        """
        answer = self._complete(tokens, longest)
        stopped = answer["stop_type"] == "eos"
        return tuple(answer["tokens"][:-1] if stopped else answer["tokens"]), stopped

    def stops_at(self, token: int, *, after: Sequence[int]) -> bool:
        """Whether generation ends where `token` comes; it is made to come after the tokens `after`."""
        answer = self._complete(after, 2, logit_bias=[[token, 10_000.0]])
        return (answer["stop_type"], answer["tokens"]) == ("eos", [token])

    def _complete(self, tokens: Sequence[int], longest: int, **more: object) -> dict[str, Any]:
        asked = {
            "prompt": list(tokens), "n_predict": longest, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
            "repeat_penalty": 1.0, "cache_prompt": False, "return_tokens": True, **more,
        }  # fmt: skip
        return self._post("/completion", asked)

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as reason:
            said = json.load(reason).get("error", {}).get("message", str(reason))
            raise LoraError(f"llama.cpp refuses: {' '.join(str(said).split())}", exit_code=1) from reason
        return found


@contextmanager
def run_llama_cpp(
    model: Path, *, vocabulary: int, context: int = 2048, adapter: Path | None = None
) -> Iterator[LlamaCpp]:
    """The GGUF file `model` in llama.cpp, with the LoRA in the GGUF file `adapter`.

    Args:
        model: a whole model.
        vocabulary: number of its tokens.
        context: positions to keep room for.
        adapter: applied at scale 1.

    Raises:
        LoraError: llama.cpp cannot load it; says what it said last.
    """
    words = [str(model), str(context), *([str(adapter)] if adapter else [])]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "lora_cli.export.gguf.llama_cpp_server", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            address = next((line[len(_READY) :].strip() for line in child.stdout if line.startswith(_READY)), None)
            if address is None:
                child.wait()
                log.seek(0)
                raise LoraError(f"llama.cpp cannot load {model.name}: {_cause(log.read())}", exit_code=1)
            yield LlamaCpp(address, vocabulary)
        finally:
            child.stdin.close()
            child.kill()  # it holds nothing that has to be put away
            child.wait()
            child.stdout.close()


_READY = "listening on "


def _cause(log: str) -> str:
    """The first line that tells of an error: those after it tell what failed for it."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "assert", "fail"))]
    found = (telling or lines[-1:] or ["it says nothing"])[0]
    return re.sub(r"^[\d.]+ E ", "", found)[:300]


def _serve(model: str, context: str, adapter: str | None = None) -> None:
    """What the child does: load, tell where it listens, and stay until the parent goes."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = model
    options.n_ctx = int(context)
    options.n_parallel = 1
    options.warmup = False
    options.fit_params = False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.use_jinja = True
    if adapter is not None:
        options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(options)
    print(_READY + server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
