"""Spreading a model over ranks: the world, the mesh, tensor and sharded-data parallelism, recomputation, gradients."""
