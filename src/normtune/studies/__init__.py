"""Studies: grids of trainings and evaluations, with their tables and report page."""
