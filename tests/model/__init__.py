"""Tests of the CLIP runtime."""
