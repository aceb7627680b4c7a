"""Names and tags that trackers refuse, so that a run is told before it starts. No torch.

From the sources of wandb 0.31, mlflow 3.17, trackio 0.43 and swanlab 0.10; Comet says nothing of its own. A name from
an environment variable, or one that only a server refuses, is told when the tracker starts.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lora_cli.recipe.problem import Conflict, shorten
from lora_cli.recipe.tracking_section import TrackerName, TrackingSpec


class Limit(NamedTuple):
    """What a tracker takes in a key of the section."""

    length: int | None = None  # characters
    pattern: str = r".*"  # of the whole text
    words: str = ""  # what the pattern says: "wandb takes ..."


LIMITS: dict[TrackerName, dict[str, Limit]] = {
    "wandb": {"project": Limit(128, r"[^/\\#?%:]*", r"no / \ # ? % : in it"), "tags": Limit(64)},
    "mlflow": {
        "project": Limit(500, r"[^']*", "no ' in it"),  # Accelerate's search for the experiment does not escape it
        # A tag is a key here, which could be the name of a file.
        "tags": Limit(
            250,
            r"(?!\.\.)(?!(.*/)?\.{1,2}(/|$))[\w.\- :]+(/[\w.\- :]+)*",
            "letters, digits, spaces and _ - . :, also / between them",
        ),
    },
    "trackio": {
        "project": Limit(
            pattern=r"(?!registry-)(?!.+_(system|configs|traces|artifacts|artifact_versions|artifact_aliases"
            r"|run_artifact_links)$).*",
            words="no names that begin or end like those of its own files",
        ),
        "space": Limit(96, r"([\w.-]+/)?[\w.-]+", "the id of a Space, as in USER/NAME"),
    },
    "swanlab": {
        "project": Limit(100, r"[0-9a-zA-Z_\-+.]+", "letters, digits and _ - + ."),
        "entity": Limit(25, r"[0-9a-zA-Z\-_]+", "letters, digits and _ -"),
        "name": Limit(512),
        "tags": Limit(512),
    },
}
MOST_TAGS: dict[TrackerName, int] = {"swanlab": 30}


def check_limits(spec: TrackingSpec) -> Iterator[Conflict]:
    """Yield conflicts for names and tags that a tracker of the run refuses."""
    texts = [(key, key, getattr(spec, key)) for key in ("project", "name", "entity", "space") if getattr(spec, key)]
    texts += [("tags", f"tags[{index}]", tag) for index, tag in enumerate(spec.tags) if tag]
    for key, place, text in texts:
        if not text.isprintable() or text != text.strip():
            message = f"'{shorten(text)}' has an unprintable character, or a space at an end"
            yield Conflict(f"tracking.{place}", message, "remove it")
            continue
        for tracker in spec.to:
            limit = LIMITS.get(tracker, {}).get(key, Limit())
            if limit.length is not None and len(text) > limit.length:
                message = f"has {len(text):,} characters, and {tracker} takes at most {limit.length}"
                yield Conflict(f"tracking.{place}", message, "shorten it", ("tracking.to",))
            elif not re.fullmatch(limit.pattern, text):
                message = f"{tracker} does not take '{shorten(text)}'"
                yield Conflict(f"tracking.{place}", message, f"it takes {limit.words}", ("tracking.to",))
    for tracker in spec.to:
        most = MOST_TAGS.get(tracker)
        if most is not None and len(spec.tags) > most:
            message = f"has {len(spec.tags)} tags, and {tracker} takes at most {most}"
            yield Conflict("tracking.tags", message, "remove some", ("tracking.to",))
