"""The family of text classifiers on a pretrained encoder."""
