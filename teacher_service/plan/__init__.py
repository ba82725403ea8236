"""Plan: size, time, cost of a job before it runs."""
