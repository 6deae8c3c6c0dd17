"""Rows of numbers and categories, and a binary outcome."""
