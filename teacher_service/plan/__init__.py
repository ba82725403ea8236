"""What a job will write, take and cost, before it runs."""
