"""Train an adapter: training loop, optimizer, learning rate schedule, checkpoints, signals, distributed launch."""
