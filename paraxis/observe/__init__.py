"""Seeing a run: its folder, metrics, events, progress, throughput, memory and traces."""
