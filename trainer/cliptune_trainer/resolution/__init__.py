"""Image sizes over the course of a training: which one each step sees, and how much it is augmented."""
