"""The calls that laws are run on."""
