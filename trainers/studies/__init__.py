"""Studies: many short runs of ``trainers.train``, one row each, and what can be said of them."""
