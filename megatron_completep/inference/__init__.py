"""Text from a model, and how likely it finds texts."""
