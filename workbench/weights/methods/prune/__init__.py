"""Methods that leave single weights out."""
