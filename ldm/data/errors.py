"""The one error that data readers and writers raise."""

from ldm.registry import ConfigError


class DataError(ConfigError):
    """Files of a data set are missing, unreadable or inconsistent. The message is one line, ready to show."""
