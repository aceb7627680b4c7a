"""Exports for Ollama: a GGUF file and a Modelfile with a template in Go's language."""
