"""Scores with confidence intervals; each way of counting has its own name."""
