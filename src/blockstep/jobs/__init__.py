"""Long work on the block graph: see `blockstep.jobs.job` for the life cycle, and one module for each kind of job."""
