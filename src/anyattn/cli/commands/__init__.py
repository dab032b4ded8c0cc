"""One module for each command; each returns data."""
