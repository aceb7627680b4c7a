"""Fine-tune language models with LoRA and QLoRA from one YAML recipe."""
