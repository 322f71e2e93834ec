"""Ours against diffusers and transformers: workloads, figures, table. `scripts/benchmark.py` runs it."""
