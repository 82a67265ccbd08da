"""Data for the trainers: batches are pure functions of (seed, step), every token has its domain."""
