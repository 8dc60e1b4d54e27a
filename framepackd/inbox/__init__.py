"""What lies in the inbox, and what belongs together; nothing is taken or changed here."""
