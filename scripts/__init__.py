"""One command each: `python -m scripts.NAME`."""
