"""Examples: read them from files and the hub, split them, and check the splits."""
