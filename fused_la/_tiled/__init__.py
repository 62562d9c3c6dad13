"""Rows whose classes are processed in tiles: blocks, partial softmax states and how they merge, tiles of a head."""
