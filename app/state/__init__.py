"""State on disk: the state directory, its files and databases, and the outputs of stages."""
