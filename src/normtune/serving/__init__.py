"""A server that answers requests for many adapters over one base."""
