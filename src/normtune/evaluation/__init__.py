"""Evaluates predictions: scores, result files, comparisons and the review page."""
