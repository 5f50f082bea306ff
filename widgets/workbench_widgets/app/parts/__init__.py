"""The parts of the page above its tabs, and what parts and tabs share of a workspace."""
