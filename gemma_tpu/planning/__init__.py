"""Whether a config fits a slice, how fast it is and what it costs, before anything is rented."""
