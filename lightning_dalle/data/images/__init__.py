"""Images: decoding of any file, transforms and near-duplicates."""
