"""The networks, as plain modules: tensors in, tensors out. No Lightning, no files."""
