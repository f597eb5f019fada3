"""Computes the peak memory of a training run before any weights are loaded."""
