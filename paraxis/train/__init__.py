"""Assembling a run from its configuration, and its loop."""
