"""A model and a machine into a vLLM command, or the reason why not."""
