"""Acting on gradients: learning-rate curves, parameter groups and the optimizers."""
