"""From named parameters and a table to an update rule over one flat, sharded buffer."""
