"""Methods that store entries in low-rank spaces."""
