"""The pages beside the session: choosing a recipe, stored results, and what serving would cost."""
