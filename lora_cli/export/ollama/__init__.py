"""Export for Ollama: a GGUF file and a Modelfile whose chat template is in Go's template language."""
