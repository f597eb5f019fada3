"""Code that the dataset readers share: rows, cells, tables and conversations."""
