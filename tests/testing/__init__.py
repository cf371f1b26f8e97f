"""Tests of proxy_fsm.testing."""
