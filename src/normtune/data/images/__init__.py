"""Image files as 8-bit RGB."""
