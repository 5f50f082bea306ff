"""Mathematics of rounding and pruning that several weight methods need."""
