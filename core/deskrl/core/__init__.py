"""Code that all roles share: configuration, gRPC, security, stored formats, run directory and process lifecycle."""
