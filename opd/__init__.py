"""opd: an experiment framework for distilling language models."""

__version__ = "0.1.0"
