"""Safetensors files, read and written one tensor at a time."""
