"""The workers of an engine: each runs on its own thread and posts what it observes."""
