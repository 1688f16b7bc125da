"""What people read: words, tables, pictures."""
