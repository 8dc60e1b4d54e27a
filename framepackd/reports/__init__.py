"""What the daemon tells others: systemd, hooks, Prometheus."""
