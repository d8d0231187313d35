"""Train on real images through the daemon, from set-up to served model."""
