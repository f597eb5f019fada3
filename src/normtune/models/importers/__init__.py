"""Importers that convert original checkpoints to the layout that `load` reads."""
