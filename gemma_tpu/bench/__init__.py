"""An OpenAI-compatible server under load, measured."""
