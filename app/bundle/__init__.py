"""The bundle: the immutable directory that training makes and everything else consumes."""
