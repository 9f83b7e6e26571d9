"""The decoder: how it computes, not how it is trained."""
