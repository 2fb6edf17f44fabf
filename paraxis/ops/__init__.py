"""Tensor maths: a readable reference beside every fast path, and one front that chooses between them."""
