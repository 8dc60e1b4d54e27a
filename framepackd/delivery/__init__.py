"""Results go out: to the outbox or the failed folder, complete."""
