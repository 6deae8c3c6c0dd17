"""Keeps endpoints up to date: follows the registry's aliases, and sets the weights of bandits."""
