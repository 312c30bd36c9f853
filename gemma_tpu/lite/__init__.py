"""serve-lite: a small OpenAI-compatible server on our own sampler."""
