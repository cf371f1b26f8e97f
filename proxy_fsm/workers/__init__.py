"""Who does the work of an engine and posts what it observes: each on a thread of its own."""
