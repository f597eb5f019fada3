"""Several adapters over one base: each row of a batch uses its own adapter."""
