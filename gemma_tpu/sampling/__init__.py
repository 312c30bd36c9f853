"""Prompts in, text out: by our model or by a server."""
