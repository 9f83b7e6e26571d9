"""One operation a file, each in the order kernels, launchers, registration with torch, autograd function, public function."""
