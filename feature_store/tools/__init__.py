"""Tools for people: command line, checks, reports and plots."""
