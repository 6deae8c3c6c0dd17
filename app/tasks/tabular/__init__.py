"""The family of networks that predict a binary label from numbers and categories."""
