"""The networks as plain PyTorch modules, without Lightning."""
