"""The family of recommenders, which rank the items that a user may take next."""
