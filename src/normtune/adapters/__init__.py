"""Trained adapters: stored on disk, merged, exported, and several of them over one base."""
