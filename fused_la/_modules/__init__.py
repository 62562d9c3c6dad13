"""What the loss modules and the head module share: their options and per-class tensors."""
