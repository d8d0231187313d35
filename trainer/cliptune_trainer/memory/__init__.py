"""Memory: what a step takes, what it may take, and the micro-batch that follows."""
