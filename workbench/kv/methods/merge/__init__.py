"""Methods that merge what is dropped into what is kept."""
