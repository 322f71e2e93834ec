"""Sampling runs: `plan` checks a config, `run` draws it, `output` writes the files."""
