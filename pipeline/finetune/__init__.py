"""Training a classifier: labelled images in, a checkpoint in the Hub's layout out."""
