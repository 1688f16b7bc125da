"""The bridge to transformers and PEFT: adapter folders, backbones, live weights, the Trainer."""
