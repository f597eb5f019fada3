"""What a recipe trains, and how."""
