"""Convert the exceptions of libraries that open a model (transformers, tokenizers, safetensors) into one LoraError.

The model's files come from strangers. `model_files` checks them first; what passes there can still be refused deep in a
library, by an exception of nearly any class.
"""

import os
import re
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lora_cli.errors import LoraError
from lora_cli.model.safetensors_header import conversion_hint
from lora_cli.run.read_file import printable
from lora_cli.run.system_errors import OF_THIS_MACHINE, system_error

# That a library raises because of a file's contents. RuntimeError contains RecursionError and NotImplementedError.
FILE_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
    RuntimeError, NameError, SafetensorError, StrictDataclassError,
)  # fmt: skip
# Whose texts are sentences for a user; of the other classes, the name is needed too.
TELLING = (OSError, ValueError, ImportError, SafetensorError)

MAX_TEXT = 400  # characters of a library's message, which may quote the file


class library_errors:  # used like a function: `with library_errors(path):`
    """Context manager that raises a LoraError in place of what a library raises about a wrong or damaged model.

    Too little memory, errors of a GPU and interrupts pass, and so do most errors in code of the model's repository.
    """

    def __init__(self, path: str, *, part: str = "", hint: str = "", trusted: bool = False) -> None:
        """Set up the messages.

        Args:
            path: of the model, for messages: a folder, a hub id or a GGUF file.
            part: what is opened, for messages: `config.json`.
            hint: for a damaged file; by default, one about the path.
            trusted: whether code of the model's repository may run.
        """
        self.path, self.part, self.hint, self.trusted = path, part, hint, trusted

    def __enter__(self) -> None:
        return

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, LoraError) or not self._is_about_file(error):
            return
        if (found := system_error(error)) is not None and found.errno in OF_THIS_MACHINE:
            return
        message, hint = _describe(error, self.path, part=self.part, hint=self.hint)
        raise LoraError(f"model.path: {self.path} cannot be loaded: {message}", hint=hint) from error

    def _is_about_file(self, error: BaseException) -> bool:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "allocate memory" in str(error):
            return False
        if self.trusted:  # a mistake in the model's own code keeps its traceback
            return isinstance(error, (OSError, ValueError, ImportError)) or "mismatch" in str(error)
        # tokenizers raises plain Exceptions, and where Rust panics a class that cannot be imported.
        return isinstance(error, FILE_ERRORS) or type(error) is Exception or is_panic(error)


class panics_as_errors:  # used like a function: `with panics_as_errors("the tokenizer of x", hint=...):`
    """Context manager that raises a LoraError in place of a panic of a library's Rust code; all else passes."""

    def __init__(self, subject: str, *, hint: str) -> None:
        """Set subject and hint of the message."""
        self.subject, self.hint = subject, hint

    def __enter__(self) -> None:
        return

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and is_panic(error):
            raise LoraError(f"{self.subject} fails: {printable(str(error))}", hint=self.hint) from error


def is_panic(error: BaseException) -> bool:
    """Return whether the Rust code of a library (tokenizers, safetensors) has panicked."""
    return (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")


def _describe(error: BaseException, path: str, *, part: str, hint: str) -> tuple[str, str]:
    """Return message and hint for what a library raised about the model at `path`; `hint` if nothing more is known."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    first = printable(lines[0], MAX_TEXT)
    is_folder = Path(path).is_dir()
    if "trust_remote_code" in text:
        pin = "" if is_folder else ", and pin the commit that you have read in model.revision"
        return (
            "it needs Python code from its repository, which runs only if you trust it",
            f"read the code, then set model.trust_remote_code: true (lora merge: --trust-remote-code){pin}",
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return first, "give a model that the installed transformers knows, or upgrade it: pip install -U transformers"
    if "Unrecognized configuration class" in text:
        return (
            f"{first.partition(' for this kind')[0]}: transformers has no such model for this task",
            "give a model of another architecture, or choose another task",
        )
    if "use_safetensors=True" in text:
        return "it has no model.safetensors", conversion_hint(path)
    if isinstance(error, ImportError):
        return first, "install the package that it names"
    if isinstance(error, RuntimeError) and ("loading state_dict" in text or "mismatch" in text):
        return "the shapes of its weights differ from its config.json", "download the model again, or give another one"
    if isinstance(error, StrictDataclassError):
        first = lines[-1].partition(": ")[2] or first  # after the name of the field, which it repeats
    elif not isinstance(error, TELLING) and type(error) is not Exception:
        first = f"{type(error).__name__}: {first}"
    # tokenizers gives positions in a text that transformers has rewritten.
    first = re.sub(r" at line \d+ column \d+$", "", first)
    message = printable(first, MAX_TEXT)
    if part and (hint or not isinstance(error, OSError)):
        message = f"{part}: {message}"
    if hint:
        return message, hint
    if is_folder:
        return message, "model.path accepts a folder that save_pretrained wrote, a .gguf file or a hub id"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return message, "offline, and not all of its files are in the cache: unset HF_HUB_OFFLINE, or give a local path"
    return message, "check the hub id, or give a local folder or .gguf file as model.path"
