"""The similarity index: made from committed rows, kept in step with them, measured, served and searched.

build.py tells its life; record.py what a version is; kinds.py and drift.py the rules; draft.py, lists.py,
whole.py and tasks.py make the files; vectors.py holds the exact vectors; engine.py answers, truth.py and
tuning.py say how well.
"""
