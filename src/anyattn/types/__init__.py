"""Values that never change: the spec of a call, reasons, decisions and names."""
