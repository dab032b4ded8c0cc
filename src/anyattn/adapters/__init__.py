"""The backends, one file or package per family; none imports another, and a kernel only inside `load`."""
