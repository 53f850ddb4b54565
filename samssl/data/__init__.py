"""Scans, the slice store made of them, its splits, and recipes for public data sets."""
