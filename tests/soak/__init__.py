"""What a transport to OpenSSH must survive, at any length: `make soak` runs the long form, the tests a short one."""
