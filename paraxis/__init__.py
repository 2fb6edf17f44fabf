"""paraxis: train large generative models on any mix of parallel axes, with the same numbers."""

__version__ = "0.1.0"
