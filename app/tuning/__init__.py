"""Sweeps: Optuna chooses the settings of each trial, Ray Tune runs the trials, and SQL stores them."""
