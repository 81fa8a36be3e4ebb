"""Studies: arms × seeds under one budget, run as ordinary training runs, compared with what a paper says."""
