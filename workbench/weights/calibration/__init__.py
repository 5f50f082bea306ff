"""Calibration texts, and what is learnt of a model from them."""
