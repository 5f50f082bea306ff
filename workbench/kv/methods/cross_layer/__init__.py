"""Methods whose layers hold something in common."""
