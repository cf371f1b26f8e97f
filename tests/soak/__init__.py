"""What a transport of OpenSSH has to survive, at any length: `make soak` runs the long form, the tests a short one."""
