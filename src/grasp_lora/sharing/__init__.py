"""What goes to other people and programs: exports, and what an adapter costs to run."""
