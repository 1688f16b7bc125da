"""What all stages share: the backbone, encoded examples, the reporter, the processes."""
