"""gRPC faces of the daemon: thin servicers over its application objects."""
