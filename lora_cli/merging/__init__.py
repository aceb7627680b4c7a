"""Merge LoRA adapters into base weights (W + scale·BA in fp32), verify the result, combine and resize adapters."""
