"""Methods that store fewer numbers of each entry."""
