"""Our programs timed beside what a user would take instead."""
