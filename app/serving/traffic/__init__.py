"""The variants of an endpoint, and how units are shared among them."""
