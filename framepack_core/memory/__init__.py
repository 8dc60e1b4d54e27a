"""What fits where: footprints, plans, the device, and how weights are moved to it."""
