"""Fourier transforms, which array-api-compat imports and nothing here calls."""
