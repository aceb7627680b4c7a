"""Read the configs of other tools (axolotl, LLaMA-Factory, TRL, ...) and write recipes of this one. No torch."""
