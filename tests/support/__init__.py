"""What the tests of several rooms share: small models and runs, ranks, and other programs."""
