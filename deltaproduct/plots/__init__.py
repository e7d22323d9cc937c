"""Figures from summaries; matplotlib is imported only when one is drawn."""
