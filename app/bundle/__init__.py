"""The bundle: an immutable folder that training makes and everything after it reads."""
