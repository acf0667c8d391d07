"""The version, read by the package, the build and every checkpoint's model card."""

__version__ = "0.1.0"
