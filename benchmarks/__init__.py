"""What this project claims about speed and memory, measured: `python -m benchmarks [name ...]`."""
