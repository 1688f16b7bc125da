"""How the ratio is searched: settings, schedule, policy, rounds."""
