"""Studies: a search for better settings, whose trials are ordinary jobs of the same daemon.

`space` settles what varies, while the study prepares. `runner` submits trials and follows them; `trial` is
one of them as a job; `search` remembers what was tried and says what to try next; `report` writes what came
of it. Nothing here trains, and but for `space` nothing imports torch.
"""
