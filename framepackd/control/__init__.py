"""Status and commands: sends a command to the daemon, or performs it if none runs."""
