"""What methods of one kind have in common: their budgets, and what they take of a model."""
