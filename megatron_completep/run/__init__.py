"""The contract between the loop, its guards and its checkpoints: state, step, hooks."""
