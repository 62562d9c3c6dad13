"""Base classes of the loss and head modules: their options and per-class tensors."""
