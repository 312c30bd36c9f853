"""Merged weights and adapters, and the proof that they are right."""
