"""Search the prune ratio: settings, schedule, policy, rounds."""
