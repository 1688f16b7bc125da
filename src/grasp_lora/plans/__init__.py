"""Plans of stages, and the executor that does the stages of a plan."""
