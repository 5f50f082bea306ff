"""Methods that store entries at fewer bits."""
