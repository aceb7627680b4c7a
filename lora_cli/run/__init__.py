"""The run folder: its files and lock, atomic writes, the metrics log and the console. No torch."""
