"""The model card (an adapter's README.md): base, recipe, data ledger, losses; no paths of this machine. No torch."""

from typing import Any

from lora_cli.recipe.schema import Recipe
from lora_cli.run.redact import redact_path


def render_model_card(
    recipe: Recipe,
    *,
    recipe_text: str,
    ledger: dict[str, Any],
    results: dict[str, dict[str, Any]],
    step: int,
    steps_done: int,
) -> str:
    """Return the model card as Markdown with YAML front matter.

    Args:
        recipe: of the run.
        recipe_text: the resolved recipe as YAML.
        ledger: `Ledger.to_json()`.
        results: evaluation loss and accuracy by name ("base", "adapter"); empty if no rows were held out.
        step: of the adapter.
        steps_done: of the run.
    """
    base = redact_path(recipe.model.path)
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: peft",
        f"tags: [{recipe.adapter.method}]",
        "---",
        f"# {recipe.adapter.method} adapter of {base}",
        "",
        f"{_describe_options(recipe)}. A plain PEFT adapter for task {recipe.task}:",
        "",
        "```python",
        "from peft import PeftModel",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
        "```",
        "",
        *_new_tokens(recipe),
        "## Data",
        "",
    ]
    for entry in ledger["sources"]:
        name, dropped = redact_path(entry["source"]), sum(entry["dropped"].values())
        lines.append(
            f"- {name} ({entry['format']}): {entry['read']:,} rows read, {entry['kept']:,} kept, "
            f"{dropped:,} dropped, {entry['held_out']:,} held out, {entry['cut']:,} cut"
        )
    for split in ("train", "eval"):
        if ledger[split]:
            totals = ledger[split]
            lines.append(
                f"- {split}: {totals['rows']:,} rows, {totals['tokens']:,} tokens, {totals['supervised']:,} supervised"
            )
    if results:
        lines += ["", "## Held-out rows", "", "| | loss | accuracy |", "|---|---|---|"]
        accuracies = {name: "" if r["accuracy"] is None else f"{r['accuracy']:.1%}" for name, r in results.items()}
        lines += [f"| {name} | {r['loss']:.4f} | {accuracies[name]} |" for name, r in results.items()]
    if recipe.training.keep == "best":
        lines += ["", f"The adapter is that of step {step} of {steps_done}, with the lowest loss of all evaluations."]
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", _redact_paths(recipe, recipe_text).rstrip(), "```", ""])


def _new_tokens(recipe: Recipe) -> list[str]:
    new_tokens = recipe.model.new_tokens
    if not new_tokens:
        return []
    tokens = ", ".join(f"`{token}`" for token in new_tokens)
    return [
        f"Its tokenizer adds {tokens} to the base's tokens. If the base has fewer embeddings than "
        "`len(tokenizer)`, call `base_model.resize_token_embeddings(len(tokenizer))` before loading the adapter.",
        "",
    ]


def _describe_options(recipe: Recipe) -> str:
    """Return the options of the adapter, such as `Rank 16, alpha 32, target modules all-linear`."""
    options = recipe.adapter.model_dump(exclude={"method", "source"}, exclude_none=True)
    parts = [f"{key.replace('_', ' ')} {_format_value(value)}" for key, value in options.items() if value is not False]
    return ", ".join(parts)[:1].upper() + ", ".join(parts)[1:]


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _redact_paths(recipe: Recipe, text: str) -> str:
    """Redact every path of the recipe in `text`, its YAML."""
    data = recipe.data
    sources = [s for s in (data.train, data.eval) if isinstance(s, str)]
    sources += [spec.path for specs in (data.train, data.eval) if isinstance(specs, list) for spec in specs]
    paths = [recipe.model.path, recipe.output, *sources, data.chat_template or "", recipe.adapter.source or ""]
    for path in sorted(paths, key=len, reverse=True):  # the longest first, because one path can contain another
        if path != redact_path(path):
            text = text.replace(path, redact_path(path))
    return text
