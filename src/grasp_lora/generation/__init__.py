"""Generate the answers of a model and compute their losses, in batches."""
