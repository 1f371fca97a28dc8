"""Exact resume: `samplers` say which record is used when, `streaming` keeps positions in shards; `examples` batches."""
