"""What the trainer says and is told: events into the journal first, then over the link; instructions back."""
