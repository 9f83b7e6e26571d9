"""Token files, the order of samples, and batches. `loader.build_loader` is the entrance for training."""
