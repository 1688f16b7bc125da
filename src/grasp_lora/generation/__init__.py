"""Answers of a model, and their losses, in batches."""
