"""Deploys, changes and removes endpoints on the cluster, and reports their status."""
