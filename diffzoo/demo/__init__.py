"""A page in the browser: sample, compare, edit, and copy what was done as a command or as Python."""
