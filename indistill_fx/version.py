"""The version of this package; in a module of its own so that saved files can name it without importing the public face."""

__version__ = "0.2.0"
