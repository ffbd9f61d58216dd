"""`Lomo` in people's trainers: one file each, imported only by who uses it. docs/trainers.md says what is honoured."""
