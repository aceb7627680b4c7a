"""Evaluate a model: loss, perplexity and accuracy on held-out rows, generated answers, metrics, lm-eval tasks."""
