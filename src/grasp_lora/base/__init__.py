"""Files, provenance and the clock: what every room uses."""
