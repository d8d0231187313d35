"""The daemon (torch-free) and its engine process."""
