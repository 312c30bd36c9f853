"""Memory, time and what would fit, by arithmetic alone."""
