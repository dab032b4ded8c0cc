"""The terminal view of each report: rich renderables, printed by `render`."""
