"""The settings of users: the configuration, and a job's settings."""
