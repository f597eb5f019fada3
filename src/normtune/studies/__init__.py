"""Grids of trainings and evaluations, with their tables and report page."""
