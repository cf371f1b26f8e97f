"""The tests: one file a module, and `e2e` against the real programs."""
