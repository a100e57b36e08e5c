"""Linear algebra on plain tensors: knows neither modules nor Avalanche."""
