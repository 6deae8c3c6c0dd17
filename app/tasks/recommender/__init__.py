"""Users, items, and which items a user will want next."""
