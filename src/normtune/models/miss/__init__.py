"""The MISS network (arXiv 2401.05163)."""
