"""Provide files, provenance, the clock and the choice of a loss to all packages of grasp_lora."""
