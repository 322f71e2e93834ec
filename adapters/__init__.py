"""Adapters. Importing this package registers every one of them, and the hint extractors, under its config name."""

from adapters import controlnet, hints, ip_adapter, t2i_adapter

__all__ = ["controlnet", "hints", "ip_adapter", "t2i_adapter"]
