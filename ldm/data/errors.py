"""The one error that data readers and writers raise."""


class DataError(ValueError):
    """Files of a data set are missing, unreadable or inconsistent. The message is one line, ready to show."""
