"""Run a GGUF file in llama.cpp's HTTP server, in a child process: an abort of llama.cpp ends only the child. No torch.

The child runs xllamacpp's server, which listens on a free port of the loopback interface. The parent sends the requests
of llama.cpp's HTTP API. Flash attention is off and the key/value cache is in fp32, so that differences from
transformers come from the file's weights only. Runs on the CPU only: this project never ran it on a GPU.
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

ANSWER_TIMEOUT_S = 600  # seconds to wait for an answer of llama.cpp


class LlamaCpp:
    """HTTP client of a model that llama.cpp has loaded."""

    def __init__(self, address: str, vocab_size: int) -> None:
        self._address, self._vocab_size = address, vocab_size

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the token ids of `text`; texts of special tokens become those tokens.

        Args:
            text: the text.
            add_special: whether llama.cpp adds BOS and EOS as the file's metadata requests.

        Raises:
            LoraError: llama.cpp rejects the request.
        """
        body = {"content": text, "add_special": add_special, "parse_special": True}
        tokens: list[int] = self._post("/tokenize", body)["tokens"]
        return tokens

    def chat_prompt(self, chat: Sequence[Mapping[str, str]], variables: Mapping[str, bool] | None = None) -> str:
        """Return `chat` rendered by the file's chat template with template variables and the generation prompt.

        Raises:
            LoraError: the template rejects the chat.
        """
        body = {"messages": list(chat), "add_generation_prompt": True, "chat_template_kwargs": dict(variables or {})}
        prompt: str = self._post("/apply-template", body)["prompt"]
        return prompt

    def logprobs(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return the log-probabilities `[vocab_size]` fp64 of the token after `tokens`, in nats.

        Raises:
            LoraError: llama.cpp rejects the request.
        """
        # They are computed before the bias and sampling. But llama.cpp reports none for a token that ends generation or
        # is a part of a character: the bias makes it choose a plain letter.
        letter = self.tokenize("a")[-1]
        answer = self._complete(tokens, 1, n_probs=self._vocab_size, logit_bias=[[letter, 10_000.0]])
        logprobs = np.full(self._vocab_size, -np.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            logprobs[entry["id"]] = entry["logprob"]
        return logprobs

    def continue_greedily(self, tokens: Sequence[int], *, max_new_tokens: int) -> tuple[tuple[int, ...], bool]:
        """Return the greedy continuation of `tokens` without its EOS token, and whether it ended with EOS.

        Args:
            tokens: ids of the prompt.
            max_new_tokens: length limit of the continuation.

        Raises:
            LoraError: llama.cpp rejects the request.
        """
        answer = self._complete(tokens, max_new_tokens)
        stopped = answer["stop_type"] == "eos"
        return tuple(answer["tokens"][:-1] if stopped else answer["tokens"]), stopped

    def stops_at(self, token: int, *, after: Sequence[int]) -> bool:
        """Return whether generation ends at `token`, which a bias forces to follow the tokens `after`.

        Raises:
            LoraError: llama.cpp rejects the request.
        """
        answer = self._complete(after, 2, logit_bias=[[token, 10_000.0]])
        return (answer["stop_type"], answer["tokens"]) == ("eos", [token])

    def _complete(self, tokens: Sequence[int], max_new_tokens: int, **options: object) -> dict[str, Any]:
        body = {
            "prompt": list(tokens), "n_predict": max_new_tokens, "temperature": 0.0, "top_k": 0, "top_p": 1.0,
            "min_p": 0.0, "repeat_penalty": 1.0, "cache_prompt": False, "return_tokens": True, **options,
        }  # fmt: skip
        return self._post("/completion", body)

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as reason:
            message = json.load(reason).get("error", {}).get("message", str(reason))
            raise LoraError(f"llama.cpp rejects the request: {' '.join(str(message).split())}", exit_code=1) from reason
        return answer


@contextmanager
def run_llama_cpp(
    model: Path, *, vocab_size: int, context_length: int = 2048, adapter: Path | None = None
) -> Iterator[LlamaCpp]:
    """Load the GGUF file `model` in a llama.cpp server, which ends at the end of the `with` block.

    Args:
        model: GGUF file of a full model.
        vocab_size: rows of its embeddings, in tokens.
        context_length: size of the key/value cache, in tokens.
        adapter: GGUF file of a LoRA, applied at scale 1.

    Raises:
        LoraError: llama.cpp cannot load the model; the message contains llama.cpp's first error.
    """
    arguments = [str(model), str(context_length), *([str(adapter)] if adapter else [])]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "lora_cli.export.gguf.llama_cpp_server", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            address = next((line[len(_READY) :].strip() for line in child.stdout if line.startswith(_READY)), None)
            if address is None:
                child.wait()
                log.seek(0)
                raise LoraError(f"llama.cpp cannot load {model.name}: {_first_error(log.read())}", exit_code=1)
            yield LlamaCpp(address, vocab_size)
        finally:
            child.stdin.close()
            child.kill()  # the server has nothing to save
            child.wait()
            child.stdout.close()


_READY = "listening on "


def _first_error(log: str) -> str:
    """Return the first line that reports an error: the lines after it only report its consequences."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if any(word in line.lower() for word in ("error", "assert", "fail"))]
    line = (errors or lines[-1:] or ["its log is empty"])[0]
    return re.sub(r"^[\d.]+ E ", "", line)[:300]


def _serve(model: str, context_length: str, adapter: str | None = None) -> None:
    """Run the server in the child process: load the model, print the address, and exit when the parent exits."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = int(context_length)
    params.n_parallel = 1
    params.warmup = False
    params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.use_jinja = True
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    print(_READY + server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
