"""Methods that hold all sizes at once, or share bytes out over layers."""
