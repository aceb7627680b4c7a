"""Train an adapter: training loop, optimizer, learning rate schedule, checkpoints, distributed launch."""
