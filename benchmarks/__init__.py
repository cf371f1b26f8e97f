"""Benchmarks of this package against other ways to reach a remote port. `make bench` runs them; see README.md."""
