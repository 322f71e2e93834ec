"""Tables of ablations from config files: rows that are trained and measured alike but for a few keys."""
