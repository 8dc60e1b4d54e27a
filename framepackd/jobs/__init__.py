"""A job: its row in the database, its states, its folder."""
