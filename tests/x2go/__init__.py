"""Tests of the python-x2go API."""
