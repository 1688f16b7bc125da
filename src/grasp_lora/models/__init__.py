"""Backbones: locating, loading and placing them, and the loss of each example."""
