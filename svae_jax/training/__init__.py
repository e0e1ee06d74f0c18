"""Training: the loop, the step, the feed of images and the metrics."""
