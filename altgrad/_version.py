"""The version of AltGrad."""

__version__ = "0.1.0"
