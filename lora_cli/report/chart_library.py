"""The JavaScript of the chart library (Vega, Vega-Lite, Vega-Embed) for a page without network, cached. No torch."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run.cache_entry import cached_entry
from lora_cli.run.cache_folder import cache_folder

PACKAGE = "vl-convert-python"
EXPORTED = "window.vegaEmbed = vegaEmbed;"
FILE = "charts.js"


def chart_library(*, info: Callable[[str], None]) -> str:
    """Return the script that defines `vegaEmbed`; it takes seconds to make, so that the cache keeps it.

    Raises:
        LoraError: the package of the library is not installed, or the cache cannot be written.
    """
    try:
        release = version(PACKAGE)
    except PackageNotFoundError:
        raise LoraError(f"lora report needs {PACKAGE}", hint='pip install "lora-cli[report]"') from None
    key = hashlib.blake2b(f"{PACKAGE} {release} {EXPORTED}".encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "charts" / key
    entry = cached_entry(folder, make=_bundle, what="the chart library", versions={PACKAGE: release}, info=info)
    return (entry / FILE).read_text(encoding="utf-8")


def chart_versions() -> dict[str, str]:
    """Return the versions that the cached script depends on."""
    with suppress(PackageNotFoundError):
        return {PACKAGE: version(PACKAGE)}
    return {}


def _bundle(folder: Path) -> None:
    import vl_convert

    script = f"(() => {{\n{vl_convert.javascript_bundle(EXPORTED)}\n}})();\n"
    # In a page, these would end the script, or hide its end.
    assert "</script" not in script.lower(), "the chart library cannot be a part of a page"
    assert "<!--" not in script, "the chart library cannot be a part of a page"
    (folder / FILE).write_text(script, encoding="utf-8")
