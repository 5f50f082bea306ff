"""Methods that select on the device, at each query, what it attends to."""
