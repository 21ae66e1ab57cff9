"""Fourier transforms, which array-api-compat wants to find and nobody here calls."""
