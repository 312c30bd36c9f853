"""Completions scored: simulated Verilog, own prompts, held-out loss; and their statistics."""
