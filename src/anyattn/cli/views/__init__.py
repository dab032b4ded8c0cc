"""What people read of each report: rich renderables, printed by `render`."""
