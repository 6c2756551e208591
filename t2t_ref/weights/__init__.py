"""Weights from files and into files (chapter 14)."""
