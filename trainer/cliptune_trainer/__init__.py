"""Fine-tuning, one process a job."""
