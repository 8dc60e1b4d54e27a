"""A job: its row, its states, its work folder; the lock of the state folder."""
