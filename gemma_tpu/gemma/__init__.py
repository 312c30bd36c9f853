"""The model: an architecture as data, its mesh, its modules, its weights onto the shards of a mesh."""
