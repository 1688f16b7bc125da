"""Provide files, provenance and the clock to all packages of grasp_lora."""
