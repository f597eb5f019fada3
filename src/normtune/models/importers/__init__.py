"""Importers that convert original checkpoints to the layout that `normtune.load` reads."""
