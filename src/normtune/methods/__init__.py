"""Training methods: the recipe language, and the functions that apply a recipe to a model."""
