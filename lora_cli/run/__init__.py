"""The run folder: what is in it, who holds it, and how files get there. No torch."""
