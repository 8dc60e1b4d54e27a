"""What people may set: the configuration and a job's settings."""
