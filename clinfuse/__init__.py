"""Clinically aligned MRI-CT fusion: ROI-aware diffusion with calibrated uncertainty."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clinfuse")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
