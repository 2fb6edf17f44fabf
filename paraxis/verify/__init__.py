"""Proof that a layout computes what one process does: the recipe's model made small, run on each layout, compared number by number."""
