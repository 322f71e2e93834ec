"""Data sets. Importing this registers every reader: folder, sidecar, fill50k and synthetic."""

from ldm.data import folders, synthetic
from ldm.data.errors import DataError
from ldm.data.images import Batch, ImageData, Sample, collate

__all__ = ["Batch", "DataError", "ImageData", "Sample", "collate", "folders", "synthetic"]
