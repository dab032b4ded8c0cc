"""What a backend is: its protocol, what it declares, and which kernels are known to be wrong."""
