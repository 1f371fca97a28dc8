"""Images: decoding, transforms and near-duplicates."""
