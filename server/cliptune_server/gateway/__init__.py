"""The REST face: FastAPI routes, thin over the daemon's application objects."""
