"""Image-text data: shards to samples, samples to batches, in an order that no hardware changes."""
