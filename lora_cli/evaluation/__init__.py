"""Measuring a model: likelihood of held-out rows, and what it answers."""
