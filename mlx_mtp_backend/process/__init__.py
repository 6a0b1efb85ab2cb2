"""The engine in a process of its own: `parent` is its face, `child` the process, `wire` what they say to each other."""
