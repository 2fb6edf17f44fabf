"""Words every room shares: axes, layouts, seams, errors, configuration. Imports nothing above itself."""
