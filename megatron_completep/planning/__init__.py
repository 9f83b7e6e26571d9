"""A run on paper: parameters, memory, traffic, time, kernels."""
