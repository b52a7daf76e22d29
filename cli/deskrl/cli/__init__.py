"""The command line. Each module adds its commands to the parser; a command imports what it needs when it runs."""
