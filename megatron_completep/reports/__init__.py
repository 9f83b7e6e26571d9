"""Reports on training runs, and the quickstart, which makes a run and reports on it."""
