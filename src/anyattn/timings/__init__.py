"""How long kernels take: what was measured on this machine, what was shipped, and what follows from both."""
