"""Answers become scores with intervals and paired tests."""
