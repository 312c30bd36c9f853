"""LoRA: which projections, how what trains starts, the adapter in files of every layout."""
