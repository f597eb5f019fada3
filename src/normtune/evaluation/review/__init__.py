"""An HTML page of right and wrong predictions."""
