"""A recipe and a dataset to a trained adapter."""
