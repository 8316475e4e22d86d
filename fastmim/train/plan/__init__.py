"""Plan of a run before it starts: time, memory and communication of its steps."""
