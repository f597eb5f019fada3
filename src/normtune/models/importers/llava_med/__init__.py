"""Importer of LLaVA-Med checkpoints."""
