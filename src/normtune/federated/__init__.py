"""Training across hospitals: each trains on its own data, and only adapters are exchanged."""
