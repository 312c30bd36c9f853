"""From a file of conversations to packed batches with their loss mask, every row accounted for."""
