"""The jobs that commands and `app.api` run, from start to end."""
