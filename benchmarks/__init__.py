"""Measurements of time and memory, run as `python -m benchmarks.NAME` from the repository root."""
