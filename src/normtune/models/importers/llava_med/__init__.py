"""Importer of LLaVA-Med checkpoints (Li et al. 2023, arXiv 2306.00890): `importer.import_llava_med`."""
