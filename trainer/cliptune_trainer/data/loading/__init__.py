"""From rows to batches on the device: decoding in threads or processes, in an order that a resume repeats."""
