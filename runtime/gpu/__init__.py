"""Times of expert layers on GPUs that are not here, from measured tables: kernels, dispatch and combine, moves."""
