"""What a recording holds: each call's decision, layer and time, and how that is shown."""
