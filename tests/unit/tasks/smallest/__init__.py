"""The smallest possible family of models: a logistic regression on one number, for the contract."""
