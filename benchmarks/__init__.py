"""Compare gradient-projection methods with Avalanche's strategies, under published protocols or on own data.

Start with `python -m benchmarks list`.
"""
