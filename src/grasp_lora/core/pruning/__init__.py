"""Choose the entries to prune: importance scores, keep masks, ratios per group."""
