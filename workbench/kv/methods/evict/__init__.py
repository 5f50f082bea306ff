"""Methods that choose which entries stay."""
