"""Fold an adapter into its base: W + scale·BA, in fp32, and the proof that it is the same model."""
