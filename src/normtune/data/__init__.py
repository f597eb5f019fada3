"""Datasets as records, groups and batches."""
