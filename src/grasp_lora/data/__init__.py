"""Rows: reading them from files and the hub, dividing them, and checking the divisions."""
