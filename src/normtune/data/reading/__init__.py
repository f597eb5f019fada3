"""What the dataset readers share: rows, cells, tables and conversations."""
