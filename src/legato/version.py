"""The version of this package; the changelog must name it too."""

__version__ = "0.1.0"
