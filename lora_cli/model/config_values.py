"""Check the values in an adapter_config.json of unknown origin: types by PEFT's fields, finite numbers, regexes.

PEFT checks few types. A wrong one is an exception somewhere in PEFT or torch, or an adapter that computes something
else.
"""

import dataclasses
import math
import re
import signal
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import AdaLoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_cli.errors import LoraError
from lora_cli.run.read_file import printable

VALUE_HINT = "restore the file from its origin, or correct the value"
MAX_TEXT = 20_000  # characters of one text: target_modules that Unsloth writes as a regex have some hundreds
MAX_NAME = 255  # bytes of one part of a path
MAX_PATH = 4096  # bytes, with the zero at its end
MAX_MATCH_S = 5.0  # to match the patterns with all names of a model: some hundredths of a second are usual
# Keys whose type in PEFT is int, but which may be any number.
REAL_NUMBERS = ("lora_alpha", "alpha", "randlora_alpha", "psoft_alpha", "delora_lambda")
MIN_SCALE = 1e-12  # of alpha; adapters have 1e-2 to 1e4
SCALE = "the scale of an update, from 1e-12 to 1e12"
FREE_TEXTS = ("init_lora_weights",)  # names that PEFT gives in words: pissa_niter_[number of iters]
KINDS = {
    str: "a text", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "an object",
    types.NoneType: "null",
}  # fmt: skip


def check_values(file: Path, values: Mapping[str, Any], config_class: type[PeftConfig]) -> None:
    """Check the type and the range of each value in `file`, an adapter_config.json.

    Args:
        file: for messages.
        values: by key; those that `config_class` does not know are checked for printable texts and finite numbers only.
        config_class: of the adapter's method.

    Raises:
        LoraError: a value cannot be that of such an adapter.
    """
    hints = get_type_hints(config_class)
    for key, value in values.items():
        if (problem := _unusable(key) or _unusable(value)) is not None:
            raise LoraError(f"{file}: {printable(key)}: {problem}", hint=VALUE_HINT)
        if (hint := hints.get(key)) is None:
            continue
        accepted = str | bool | None if key in FREE_TEXTS else hint | float if key in REAL_NUMBERS else hint
        if not _matches(value, accepted):
            raise LoraError(f"{file}: {key}: {_shown(value)} is not {_describe(accepted)}", hint=VALUE_HINT)
        if key == "base_model_name_or_path" and not _is_path(value or ""):
            raise LoraError(f"{file}: {key}: {_shown(value)} is not a path or hub id", hint=VALUE_HINT)
        if (range_ := _range_of(key, value)) is not None:
            raise LoraError(f"{file}: {key}: {_shown(value)} is not {range_}", hint=VALUE_HINT)
    _check_patterns_of_layers(file, values, config_class)


def _unusable(value: Any) -> str | None:
    """Return what is wrong with a JSON value of any type, or with a part of it; None if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{_shown(value)} is too large"
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            return f"a text of {len(value):,} characters"
        if not value.isprintable():  # names are printed, and are paths: no control characters, no half of a pair
            return f"{value[:60]!a} has characters that cannot be printed"
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((problem for part in parts if (problem := _unusable(part))), None)


def _is_path(text: str) -> bool:
    """Return whether no file system refuses a text as a path because it, or a name in it, is too long."""
    return len(text.encode()) < MAX_PATH and all(len(part.encode()) <= MAX_NAME for part in text.split("/"))


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a field; objects are also accepted for PEFT's nested configurations.

    Enumerations accept each text here: PEFT reports an unknown member by name.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, each) for each in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(_matches(each, arguments[0]) for each in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_matches, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(_matches(each, arguments[1]) for each in value.values())
    if hint is None:
        return value is None
    if hint is Any:
        return True
    if hint is bool:
        return value is None or type(value) is bool  # other tools write null for a switch that is off
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, type) and hint in KINDS:
        return type(value) is hint
    return isinstance(value, str)  # an enumeration


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # In an order of our own: Python gives a union in the order in which an equal one was made first, anywhere.
        kinds = {_describe(each) for each in arguments}
        return " or ".join(sorted(kinds, key=lambda kind: (kind == "null", not kind.startswith("a list"), kind)))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"a list of {_describe(arguments[0]).rpartition(' ')[2]}s"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "an object"
    return KINDS.get(hint, "a text")


def _range_of(key: str, value: Any) -> str | None:
    """Return in words what a number of the right type should be; None if it is in range."""
    if "dropout" in key and isinstance(value, (int, float)) and not 0 <= value <= 1:
        return "a probability, from 0 to 1"
    if key in REAL_NUMBERS and value is not None and not _is_scale(value):
        return SCALE
    negative = isinstance(value, int) and value < 0
    if negative and ("rank" in key or key in ("r", "init_r", "target_r", "num_virtual_tokens", "virtual_tokens")):
        return "a number above 0"
    return None


def _is_scale(value: float) -> bool:
    return MIN_SCALE <= abs(value) <= 1 / MIN_SCALE


def _check_patterns_of_layers(file: Path, values: Mapping[str, Any], config_class: type[PeftConfig]) -> None:
    """Check the values of rank_pattern and alpha_pattern: AdaLoRA lists the components that it keeps, others ranks."""
    for name, entry in (values.get("rank_pattern") or {}).items():
        kept = issubclass(config_class, AdaLoraConfig)
        fits = isinstance(entry, list) if kept else type(entry) in (int, float) and entry > 0
        if not fits or (kept and not all(isinstance(each, bool) or each in (0, 1) for each in entry)):
            expected = "a list of true and false" if kept else "a rank above 0"
            raise LoraError(f"{file}: rank_pattern: {name}: {_shown(entry)} is not {expected}", hint=VALUE_HINT)
    for name, entry in (values.get("alpha_pattern") or {}).items():
        if type(entry) not in (int, float) or not _is_scale(entry):
            raise LoraError(f"{file}: alpha_pattern: {name}: {_shown(entry)} is not {SCALE}", hint=VALUE_HINT)


def _shown(value: Any) -> str:
    text = f"{value!a}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_patterns(file: Path, config: PeftConfig) -> None:
    """Check that the regular expressions of a configuration compile.

    Raises:
        LoraError: one does not.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key, None)
        if isinstance(value, str) or key == "layers_pattern":
            _check_regexes(file, key, [value] if isinstance(value, str) else value or ())
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):  # PEFT puts names into regular expressions
        _check_regexes(file, key, getattr(config, key, None) or ())


def _check_regexes(file: Path, key: str, patterns: Any) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as reason:
            raise LoraError(
                f"{file}: {key}: {_shown(pattern)} is not a regular expression: {reason}", hint=VALUE_HINT
            ) from None


def targeted(file: Path, config: PeftConfig, names: list[str]) -> list[str]:
    """Return those of the module names that PEFT gives an adapter by this configuration.

    All patterns of the configuration are matched, so that this fails where PEFT would match for ever.

    Raises:
        LoraError: matching takes longer than MAX_MATCH_S.
    """
    found = []
    try:
        with time_limit(MAX_MATCH_S):
            for name in names:
                for key in ("rank_pattern", "alpha_pattern"):
                    get_pattern_key((getattr(config, key, None) or {}).keys(), name)
                if getattr(config, "target_modules", None) is not None and check_target_module_exists(config, name):
                    found.append(name)
    except TimeoutError:
        raise LoraError(
            f"{file}: its regular expressions take more than {MAX_MATCH_S:g} s to match the names of the modules",
            hint="write target_modules, exclude_modules and the keys of patterns as names, or as simpler expressions",
        ) from None
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context manager that ends a block of Python code, also one regular expression, by a TimeoutError.

    Python's matcher looks for signals while it runs. In other threads than the main one there is no limit, because
    signals are handled there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler)
