"""What ships, what this machine has, a config of one's own, and what is wrong with it."""
