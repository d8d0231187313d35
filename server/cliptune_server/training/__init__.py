"""Fine-tuning jobs: what they may ask for, their queue, their trainers, their events.

`jobs.py` is the door: the faces call it, everything else here is below it.
"""
