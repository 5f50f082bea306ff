"""The state of a page: the places of a recipe, the address that holds it, the same as Python."""
