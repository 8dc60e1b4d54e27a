"""Makes inbox files of videos and data sets."""
