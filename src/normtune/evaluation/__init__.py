"""Predictions of a split to scores, result files and comparisons."""
