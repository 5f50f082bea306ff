"""What a session shows of a prompt under a recipe: attention, heads, outliers."""
