"""Tasks: the fields of an example, its prompt in each language, and its token ids."""
