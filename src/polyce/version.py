"""The version of polyce."""

__version__ = "0.1.0"
