"""Ask a daemon, or do it oneself."""
