"""Raylway: a model's whole life, from raw data to A/B-tested production, on one Ray cluster."""

__version__ = "0.1.0"
