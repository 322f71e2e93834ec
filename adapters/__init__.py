"""Adapters. Importing this package registers every one of them, fusers and hint extractors, under its config name."""

from adapters import controlnet, fuser, hints, ip_adapter, seecoder, style_adapter, t2i_adapter

__all__ = ["controlnet", "fuser", "hints", "ip_adapter", "seecoder", "style_adapter", "t2i_adapter"]
