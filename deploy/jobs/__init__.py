"""What the longer commands do: batches, preference pairs, training and evaluation."""
