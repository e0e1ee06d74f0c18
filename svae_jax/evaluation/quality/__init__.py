"""Distances between sets of images, in pixels and in the features of a pretrained network."""
