"""Which files are in the inbox, and which belong together; it changes no file."""
