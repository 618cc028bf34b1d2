"""The package's version, for modules that must not import the package's face."""

__version__ = "3.1.0"
