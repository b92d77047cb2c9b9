"""Training objectives: thin layers over ``functional``."""
