"""Provide files, the clock, words for messages and other means to all packages of grasp_lora."""
