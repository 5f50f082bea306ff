"""KV-cache methods by what they do."""
