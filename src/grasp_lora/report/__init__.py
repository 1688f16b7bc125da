"""Present results to people: words, tables, pictures."""
