"""Small random checkpoints in the layouts of the published ones."""
