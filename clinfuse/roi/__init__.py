"""Masks of anatomy and findings, made from intensities and geometry."""
