"""What CPU tensors run, and float64 tensors on any device: torch's own operators where they fit."""
