"""Measuring whole runs and single parts, with other systems beside them where they can run."""
