"""Uploaded data sets: uploads under way, what is finished, a look into it.

`datasets.py` is the application object behind both faces; nothing here knows jobs, models or the engine.
"""
