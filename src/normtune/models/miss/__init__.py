"""MISS (Chen et al. 2024, arXiv 2401.05163): the paper's small model, native; BLIP-VQA has the same shape."""
