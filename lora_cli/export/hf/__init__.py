"""Exports in the formats of the Hugging Face libraries: safetensors folders, PEFT adapters, and adapters for vLLM."""
