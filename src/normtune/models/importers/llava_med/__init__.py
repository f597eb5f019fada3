"""LLaVA-Med's original checkpoints (Li et al. 2023, arXiv 2306.00890) -> transformers' LLaVA layout."""
