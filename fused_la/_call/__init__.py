"""What a call means: arguments are checked and become a `Problem`, independent rows with their target mass."""
