"""Scores with confidence intervals. Each way of counting has its own metric name."""
