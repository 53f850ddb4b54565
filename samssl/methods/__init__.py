"""Self-supervised methods, one file a paper."""
