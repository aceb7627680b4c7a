"""Rules of a recipe's tracking section: secrets are refused, keys must have an effect. No torch."""

import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from lora_cli.recipe.adapter_rules import check_list
from lora_cli.recipe.problem import Conflict, join_words
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.tracking_limits import check_limits
from lora_cli.recipe.tracking_section import TRACKERS, TrackerFacts, TrackingSpec

# Tokens in the forms in which services issue them: the Hub's, W&B's (40 or 86 characters), OpenAI's.
TOKEN = re.compile(r"hf_\w{20,}|[0-9a-f]{40}|wandb_v\d_\w{20,}|sk-[\w-]{20,}")
IN_ENVIRONMENT = "remove it: a recipe must not contain secrets"


def check_tracking(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts for secrets in the section, repeated trackers, and keys that no tracker of the run uses."""
    spec = recipe.tracking
    if spec is None:
        return
    yield from check_list("tracking.to", [str(name) for name in spec.to])
    yield from _check_secrets(spec)
    for key in ("project", "name", "entity", "server", "space"):
        if getattr(spec, key) == "":
            yield Conflict(f"tracking.{key}", "an empty string", "write a value, or remove the key")
    if spec.tags:
        yield from check_list("tracking.tags", spec.tags)
    yield from check_limits(spec)
    users: dict[str, tuple[object, Callable[[str, TrackerFacts], bool]]] = {
        "entity": (spec.entity, lambda _, facts: facts.entity),
        "server": (spec.server, lambda name, _: name == "mlflow"),
        "space": (spec.space, lambda name, _: name == "trackio"),
        "offline": (spec.offline, lambda _, facts: facts.offline),
    }
    for key, (value, uses) in users.items():
        names: list[str] = [name for name, facts in TRACKERS.items() if uses(name, facts)]
        if value and not set(names) & set(spec.to):
            message = f"has no effect: it is for {join_words(names, 'and')}"
            yield Conflict(f"tracking.{key}", message, "remove it", ("tracking.to",))


def _check_secrets(spec: TrackingSpec) -> Iterator[Conflict]:
    """Yield a conflict for each value that has a token or a password in it, without showing it."""
    login = "; ".join(f"{name} reads {TRACKERS[name].login}" for name in spec.to if TRACKERS[name].login)
    texts = {f"tracking.{key}": getattr(spec, key) for key in ("project", "name", "entity", "server", "space")}
    texts |= {f"tracking.tags[{index}]": tag for index, tag in enumerate(spec.tags)}
    for key, text in texts.items():
        if text is None:
            continue
        if TOKEN.fullmatch(text.strip()):
            yield Conflict(key, "looks like a token", f"{IN_ENVIRONMENT}; {login}".rstrip("; "))
        elif "://" in text and _has_secret(text):
            fix = f"remove it from the address: a recipe must not contain secrets; {login}".rstrip("; ")
            yield Conflict(key, "an address with a password or token in it", fix)
        elif key == "tracking.server" and not re.match(r"https?://[^/]|databricks|file:|sqlite:", text):
            yield Conflict(key, "is not the address of a server", "write it as http://HOST:5000")


def _has_secret(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:  # brackets that are not those of an IPv6 address
        return False
    return "@" in parts.netloc or re.search(r"(?i)(token|key|secret|password)=", parts.query) is not None
