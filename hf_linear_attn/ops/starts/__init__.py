"""Where a method's parameters start: measured on a few batches, from a checkpoint's heads."""
