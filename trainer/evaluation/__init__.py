"""Measures of a model on held-out samples, the same for training and for reports."""
