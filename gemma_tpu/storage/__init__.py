"""Bytes on disk, in buckets and on the hub: read by ranges, written whole or not at all."""
