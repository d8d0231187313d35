"""Published models: their files, the index over them, their aliases, and which of them are served.

`models.py` is the door. Jobs publish through it (`training/publisher.py`), requests find their model in it.
"""
