"""Weight methods by what they do."""
