"""Which settings are in force: blocks, the process default and environment variables."""
