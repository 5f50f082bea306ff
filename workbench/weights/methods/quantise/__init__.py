"""Methods that round weights, or look them up in codebooks."""
