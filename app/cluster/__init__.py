"""Ray clusters: the local one of `raylway up`, one for a single command, or an existing one to join."""
