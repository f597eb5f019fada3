"""Trained adapters: stored on disk, merged into a checkpoint, exported, and several of them over one base."""
