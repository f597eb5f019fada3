"""The machine that runs the code: files, processes, memory and progress."""
