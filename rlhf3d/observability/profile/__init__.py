"""Where the time of one step went, in every process, on one clock."""
