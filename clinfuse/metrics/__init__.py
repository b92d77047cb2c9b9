"""Streaming metrics and the per-case suite: thin layers over ``functional``."""
