"""Networks on rows of numbers and categories that predict a binary label."""
