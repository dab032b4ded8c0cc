"""From a decision to a result."""
