"""Memory: predicts what fits, plans, and moves weights to the device."""
