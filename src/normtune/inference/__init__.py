"""A model and images to answers."""
