"""Sampling text from a model, and scoring held-out text with it."""
