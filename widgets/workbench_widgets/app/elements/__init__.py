"""The pieces that forms and panels are made of; none knows a workspace."""
