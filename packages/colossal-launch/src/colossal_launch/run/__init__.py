"""What `colossal train` runs: the job, its workers, the loop, and how it stops."""
