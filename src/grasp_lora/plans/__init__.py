"""Plans of stages, and the executor that works a plan off."""
