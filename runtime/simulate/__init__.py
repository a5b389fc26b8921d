"""Replays recorded loads through policies and says whether replication is worth it."""
