"""One base for many adapters at once: what is asked (`requests`) and what answers it (`engine`)."""
