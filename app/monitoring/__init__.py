"""What looks after deployed endpoints: versions that get an alias, weights that a bandit sets."""
