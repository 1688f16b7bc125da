"""What the numbers of a search and of a run show: curves, tests, verdict, findings."""
