"""The CLIP runtime that engine and trainer share."""
