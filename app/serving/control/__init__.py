"""Puts endpoints on the cluster, takes them off, and reports on them."""
