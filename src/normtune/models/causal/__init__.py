"""What the decoder-only families share."""
