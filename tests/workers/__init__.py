"""The workers of an engine: each is tested without one, by what it posts."""
