"""Memory, time and traffic of a run, planned before it starts."""
