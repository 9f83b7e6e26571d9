"""From named parameters and a table to AdamW over one flat, sharded buffer."""
