"""Recommenders: which items a user takes next."""
