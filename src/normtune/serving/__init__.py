"""Serving: an engine that answers requests for many adapters over one base, and an HTTP server for it."""
