"""Measuring a model: zero-shot classification and retrieval, with intervals, baselines, a table and a picture."""
