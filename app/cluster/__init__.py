"""A Ray cluster: the local one of a state directory, a command's own, or somebody else's that is joined."""
