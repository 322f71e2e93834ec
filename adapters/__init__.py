"""Adapters. Importing this package registers every one of them under its config name."""

from adapters import controlnet

__all__ = ["controlnet"]
