"""One run: built, stepped, watched, saved."""
