"""Which recipe, at which learning rate: a short search on a model and data of the user's own."""
