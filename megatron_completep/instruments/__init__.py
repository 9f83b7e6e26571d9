"""Does the parameterization hold? Checks, sweeps, replayed traces."""
