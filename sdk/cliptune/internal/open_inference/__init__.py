"""Generated: the Open Inference Protocol v2, for the daemon alone.

Its names (package `inference`) are those of other libraries' stubs: one process cannot hold both.
"""
