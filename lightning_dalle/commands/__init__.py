"""Commands of this package; each imports torch only inside its function, so that `--help` and errors appear at once."""
