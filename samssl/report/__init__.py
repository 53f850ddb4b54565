"""The study report: what a study folder holds, its numbers, its figures, one page."""
