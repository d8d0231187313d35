"""The engine process: decode → batcher → towers, for the models of one device.

Started as `python -m cliptune_server.engine` by the daemon, which it never imports.
"""
