"""Ranks: process groups, agreement between ranks, and failures."""
