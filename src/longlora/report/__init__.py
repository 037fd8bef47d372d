"""report.html: what a run did and how well it worked, on one page that needs nothing else."""
