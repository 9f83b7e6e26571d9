"""Token files, the order of samples, and batches. Training begins at `loader.build_loader`."""
