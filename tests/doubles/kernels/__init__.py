"""One module for each package that is faked."""
