"""A run folder: its metrics and its checkpoints."""
