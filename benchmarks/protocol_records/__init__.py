"""Protocols as records, family by family."""
