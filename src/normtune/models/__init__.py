"""Model families: load, tokenise, collate, compute the loss, generate answers."""
