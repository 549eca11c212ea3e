"""How fast xdist is, beside what its users have: `make bench`, or `python -m benchmarks NAME …`."""
