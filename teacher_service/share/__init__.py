"""Who computes a job's tasks: processes of this machine, or actors of a Ray cluster."""
