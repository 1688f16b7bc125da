"""Draw conclusions from a search and a run: loss curve, tests, verdict, findings."""
