"""The Python API: functions that take names or objects, and results that notebooks show.

`import normtune` offers them as `normtune.train`, `normtune.evaluate` and so on; the commands call them too.
"""
