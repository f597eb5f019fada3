"""Training: a recipe and a dataset -> a trained adapter."""
