"""Measurements of this package beside other ways to reach a remote port. `make bench` runs them; see README.md."""
