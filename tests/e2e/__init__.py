"""Tests against the real programs: OpenSSH, X2Go's server, nxagent, nxproxy and Xvfb."""
