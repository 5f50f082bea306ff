"""Methods that make modules narrower, or take blocks out."""
