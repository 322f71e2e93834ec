"""Figures: how close, how obedient, how retrievable."""
