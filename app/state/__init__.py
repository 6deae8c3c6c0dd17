"""What is kept on disk: the state directory, its files, databases and finished stages."""
