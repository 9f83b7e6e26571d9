"""What runs left behind, for people."""
