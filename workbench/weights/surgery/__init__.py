"""Changes of a model that leave its function as it is, and where a module can be made smaller."""
