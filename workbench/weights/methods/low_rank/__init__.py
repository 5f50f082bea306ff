"""Methods that write weights as products of smaller matrices."""
