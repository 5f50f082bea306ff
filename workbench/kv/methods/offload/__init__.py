"""Methods that keep a part of the cache in host memory and retrieve from it."""
