"""Is this machine right: checks, a trial video, calibration, the service."""
