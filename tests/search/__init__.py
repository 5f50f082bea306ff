"""Tests of the search for a recipe."""
