"""Router traces: how they are recorded, stored, read and summarised."""
