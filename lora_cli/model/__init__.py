"""The base model and the adapter on it: loading, targets, attention over packed rows, fused LoRA layers."""
