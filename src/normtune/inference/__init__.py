"""Inference: a model and images -> answers."""
