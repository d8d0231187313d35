"""The machine: what is here, what computes rightly on it, and what follows for training and serving."""
