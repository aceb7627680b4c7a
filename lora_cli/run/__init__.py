"""The run folder: its files and lock, atomic writes, the metrics log, console and signals. No torch."""
