"""What commands share: the inputs of a run, and the model built for training."""
