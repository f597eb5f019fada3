"""Importer of MISS and BLIP-VQA checkpoints: `importer.import_miss`."""
