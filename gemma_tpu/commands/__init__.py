"""The arguments of each command, and what it prints."""
