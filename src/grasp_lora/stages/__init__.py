"""The stages of a run, one in a file. Inputs are explicit, and the result is a folder."""
