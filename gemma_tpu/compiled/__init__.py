"""The text of a compiled module, read: its operations, bytes, links, memory and time."""
