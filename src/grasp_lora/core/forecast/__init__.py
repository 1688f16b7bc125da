"""What a run would cost on other machines: a model of kernels, in numbers alone."""
