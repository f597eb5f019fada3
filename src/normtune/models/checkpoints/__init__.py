"""Checkpoint files read and written one tensor at a time, so that no whole model is in memory."""
