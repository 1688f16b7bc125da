"""Backbones: found, loaded, placed, and read row by row."""
