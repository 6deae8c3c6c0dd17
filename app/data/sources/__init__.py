"""The sources of raw data: files of rows, and the sample data."""
