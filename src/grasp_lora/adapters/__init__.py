"""PEFT adapters: read, check, attach, open and write them."""
