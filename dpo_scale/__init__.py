"""Direct Preference Optimization with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
