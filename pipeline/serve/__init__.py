"""A page and an API over an output: search, look, review. Started by hand, imported by no other room.

It reads committed rows, the served index, labels and groups of duplicates, and writes nothing but
decisions of reviews. What it makes for itself (tables, thumbnails) lies in a cache on this machine.
"""
