"""Importer of MISS and BLIP-VQA checkpoints."""
