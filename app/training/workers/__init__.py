"""Ray Train's workers: starting them, resizing their group, and messages between them and the command.

Every use of a private part of Ray Train is in this package.
"""
