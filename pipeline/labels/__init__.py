"""Labels for the images of an output, from what extract has stored: no model runs again.

make.py tells how a version is made; head.py, neighbours.py and probe.py turn rows into probabilities,
decide.py those into labels; temperature.py makes probabilities mean what they say; overrides.py and
reviews.py put in what people know better. suggest.py and suspects.py say what to look at; exports.py is for
other tools.
"""
