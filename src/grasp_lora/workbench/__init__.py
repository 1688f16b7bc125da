"""What every stage works with: backbone, encoded examples, reporter, processes."""
