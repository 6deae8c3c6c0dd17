"""Metrics of a model, its comparison with the champion, the gate and the card of its bundle."""
