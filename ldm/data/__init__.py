"""Data sets. Importing this registers every reader: folder, sidecar, fill50k, webdataset, parquet and synthetic."""

from ldm.data import folders, parquet, shards, synthetic
from ldm.data.errors import DataError
from ldm.data.images import Batch, ImageData, Sample, collate

__all__ = ["Batch", "DataError", "ImageData", "Sample", "collate", "folders", "parquet", "shards", "synthetic"]
