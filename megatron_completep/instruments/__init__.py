"""Tests of the parameterization: coordinate check, laziness, sweeps, replayed traces."""
