"""One YAML, and `--set key=value`, become one frozen `RunConfig`."""
