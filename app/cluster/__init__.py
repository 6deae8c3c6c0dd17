"""Ray clusters: the local one of a state directory, one for a single command, or an existing one to join."""
