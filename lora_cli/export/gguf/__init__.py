"""GGUF export for llama.cpp: full models and LoRA adapters, and their verification."""
