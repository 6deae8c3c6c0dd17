"""The bundle: an immutable folder that training makes and all later stages read."""
