"""Inference as the daemon sees it: requests routed to an engine process that is kept alive.

`router.py` is the door for requests, `engines.py` keeps the process. What runs in that process is `engine/`.
"""
