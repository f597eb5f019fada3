"""Studies: a file (`spec`), its cells (`plan`), what runs them (`run`), and their tables (`table`)."""
