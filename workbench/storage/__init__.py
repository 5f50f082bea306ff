"""Sessions as folders."""
