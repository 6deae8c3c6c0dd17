"""Classifiers of texts on a pretrained encoder."""
