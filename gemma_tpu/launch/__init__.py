"""A config and a slice as a job in the cloud: the scripts that run it."""
