"""Score predictions with intervals, and compare two systems with paired tests."""
