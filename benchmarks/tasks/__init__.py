"""Real training on small machines: the tasks, the optimizers, the runs and the report."""
