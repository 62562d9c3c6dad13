"""Where the losses meet autograd, torch.func and torch.compile, and which implementation runs."""
