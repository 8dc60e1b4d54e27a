"""What fits where: footprints, plans, the device, and how weights get there."""
