"""The report: the log of a run, and the table and pictures made from it."""
