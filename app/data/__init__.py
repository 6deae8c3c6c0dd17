"""Data: reading a source, checking its contract, splitting and encoding its rows."""
