"""Which variant of a model answers which share of the units."""
