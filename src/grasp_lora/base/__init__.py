"""Provide files, the clock and the normal form of texts to all packages of grasp_lora."""
