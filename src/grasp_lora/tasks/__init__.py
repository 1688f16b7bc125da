"""Data: rows of text, their prompts and splits, and their token ids."""
