"""What weight methods did to a model: tables."""
