"""The version of the distribution `rlm-chat`; a constant, so that a frozen binary knows it too."""

__version__ = "0.1.0"
