"""Tasks: what a row asks, its prompt in each language, and its token ids."""
