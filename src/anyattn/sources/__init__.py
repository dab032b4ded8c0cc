"""Where kernels of other distributions come from: installed packages and the Hub."""
