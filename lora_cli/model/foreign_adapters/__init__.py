"""Adapters of other tools (mlx-lm, LitGPT, torchtune, pickled PEFT): read without running them, placed onto a base."""
