"""Reports to others: systemd, hooks, Prometheus metrics."""
