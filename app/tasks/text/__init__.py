"""A text and one of several classes."""
