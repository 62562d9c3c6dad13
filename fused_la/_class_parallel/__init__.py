"""Losses whose classes are sharded over ranks: what ranks exchange, agree on and compute."""
