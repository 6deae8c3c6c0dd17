"""Searching for better settings: Optuna says what to try, Ray Tune tries it, SQL keeps what came of it."""
