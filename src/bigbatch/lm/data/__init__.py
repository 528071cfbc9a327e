"""From files to tokenized samples, their validation split and their order."""
