"""Set-up of the environment. Standard library only, because it runs before anything is installed."""
