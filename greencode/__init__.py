"""GREEN-CODE: early exit for code completion, from raw code to figures."""

__version__ = "0.1.0"
