"""Diffusion maths without a network: levels, the forward process, guidance and samplers."""
