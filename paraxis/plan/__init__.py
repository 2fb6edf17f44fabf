"""Predicting a run before its GPUs are spent."""
