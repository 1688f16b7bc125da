"""The live adapter and the Trainer's callbacks."""
