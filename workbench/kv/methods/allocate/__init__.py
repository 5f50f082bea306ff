"""Methods that share the budget out over layers and heads."""
