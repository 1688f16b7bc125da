"""Which entries a ratio removes: importance, masks, ratios of groups."""
