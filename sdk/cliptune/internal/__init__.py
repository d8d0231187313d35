"""Generated: the links between daemon, engine and trainer."""
