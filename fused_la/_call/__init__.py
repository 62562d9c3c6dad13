"""Arguments of a call: they are checked and become a `Problem`, independent rows with their target mass."""
