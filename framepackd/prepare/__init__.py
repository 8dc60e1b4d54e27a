"""Videos and data sets become files for the inbox."""
