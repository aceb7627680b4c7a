"""GGUF exports for llama.cpp: whole models and LoRA adapters, with their proof."""
