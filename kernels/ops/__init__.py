"""One operation a file: kernels, launchers, registration, autograd function, public function."""
