"""One stage a file: explicit inputs in, one folder out."""
