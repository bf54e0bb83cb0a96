"""The correction tasks: one file a task family, registered with seqio on import."""
