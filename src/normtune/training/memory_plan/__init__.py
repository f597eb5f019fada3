"""The peak memory of a training run, computed before any weights are loaded."""
